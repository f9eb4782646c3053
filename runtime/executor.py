"""Runs a plan on a backend: moves, program, sampler. The only part of the runtime with tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halyard.compiler.captured import CapturedProgram
from halyard.compiler.null_program import NullProgram
from halyard.compiler.program import Program
from halyard.hal.contract import Device, PagedKernels
from halyard.hal.types import BlockMove, KVPool
from halyard.runtime.batcher import PackedStep, PooledSpan, pack
from halyard.runtime.plan import StepOutput, StepPlan, TokenLogprob
from halyard.runtime.sampler import SampledTokens, Sampler, score_tokens

__all__ = ["Executor", "RunningStep"]

Moves = Sequence[BlockMove]
_NOT_FINITE = "what the model computed is not finite: its weights may be damaged"


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that was issued. `wait` brings its results to the host."""

    plan: StepPlan
    packed: PackedStep
    sampled: SampledTokens | None  # None: no row reached its end
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]]  # by plan row
    pooled: Tensor | None  # [pooled spans, hidden] fp32, sums; None: no row pools
    device: Device

    def ready(self) -> bool:
        """Whether `wait` would return at once. The CPU's work is done when it is issued."""
        return self.device.info.kind == "cpu"

    def wait(self) -> StepOutput:
        rows = self.plan.rows
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[TokenLogprob]] = [[] for _ in rows]
        errors: dict[int, str] = {}
        position = {id(row): number for number, row in enumerate(rows)}
        if self.sampled is not None:
            ids = self.sampled.token_ids.tolist()
            bad = self.sampled.bad.tolist()
            for place, (sample, token, is_bad, scored) in enumerate(
                zip(self.packed.samples, ids, bad, self.sampled.logprobs, strict=True)
            ):
                number = position[id(sample.row)]
                tokens[number].append(token)
                if scored is not None:
                    logprobs[number].append(scored)
                if place in self.sampled.failures:
                    errors[number] = self.sampled.failures[place]
                if is_bad:
                    errors[number] = _NOT_FINITE
        pooled = {}
        if self.pooled is not None:
            for span, vector in zip(
                self.packed.pooled_spans, self.pooled.cpu().numpy(), strict=True
            ):
                pooled[span.plan_row] = vector
                if not np.isfinite(vector).all():
                    errors[span.plan_row] = _NOT_FINITE
        return StepOutput(
            token_ids=tuple(map(tuple, tokens)),
            logprobs=tuple(tuple(own) or None for own in logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs.get(i) for i in range(len(rows))),
            errors=tuple(errors.items()),
            pooled=pooled,
        )


class Executor:
    """One backend with a bound program and its pools."""

    def __init__(
        self,
        device: Device,
        kernels: PagedKernels,
        program: Program | CapturedProgram | NullProgram,
        pool: KVPool,
        host_pool: KVPool | None,
        sampler: Sampler,
    ) -> None:
        self.device = device
        self.kernels = kernels
        self.program = program
        self.pool = pool
        self.host_pool = host_pool
        self.sampler = sampler
        self.swap_out_seconds = (
            0.0  # on the caller's clock: what issuing took, where moves are issued
        )
        self.swap_in_seconds = 0.0
        program.set_pool(pool)

    def run(self, plan: StepPlan) -> RunningStep:
        """Issue a step's work. Order: swap out, swap in, copies, rows."""
        with torch.inference_mode():
            self.move(plan.swap_out, plan.swap_in, plan.copies)
            packed = pack(plan, self.pool.layout.spec.block_size, self.device.torch_device)
            masks = self.sampler.begin(packed.samples)  # made while the program runs
            inputs = (packed.input_ids, packed.logit_indices, packed.batch)
            pooled = None
            if packed.pooled_spans:
                logits, hidden = self.program.run_with_hidden(*inputs)
                pooled = _sums(hidden, packed.pooled_spans)
            else:
                logits = self.program.run(*inputs)
            sampled = self.sampler.sample(logits, packed.samples, masks) if packed.samples else None
            scored = self._score_prompts(plan, packed, logits) if packed.prompt_spans else {}
        return RunningStep(plan, packed, sampled, scored, pooled, self.device)

    def close(self) -> None:
        self.device.close()

    def move(self, swap_out: Moves = (), swap_in: Moves = (), copies: Moves = ()) -> None:
        """Move blocks, in this order."""
        if swap_out or swap_in:
            if self.host_pool is None:
                raise AssertionError("the plan swaps, but there is no host pool")
            started = time.perf_counter()
            if swap_out:
                self.kernels.swap_out(self.pool, self.host_pool, swap_out)
            middle = time.perf_counter()
            self.swap_out_seconds += middle - started
            if swap_in:
                self.kernels.swap_in(self.pool, self.host_pool, swap_in)
                self.swap_in_seconds += time.perf_counter() - middle
        if copies:
            self.kernels.copy_blocks(self.pool, copies)

    def _score_prompts(
        self, plan: StepPlan, packed: PackedStep, logits: Tensor
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        scored = {}
        for span in packed.prompt_spans:
            row = plan.rows[span.plan_row]
            first = span.first_logits_row
            targets = row.sequence.token_ids[row.start + 1 : row.start + 1 + span.num_tokens]
            num_top = row.sequence.request.params.prompt_logprobs or 0
            scored[span.plan_row] = tuple(
                score_tokens(
                    logits[first : first + span.num_tokens],
                    torch.tensor(targets, device=logits.device),
                    [num_top] * span.num_tokens,
                )
            )
        return scored


def _sums(hidden: Tensor, spans: Sequence[PooledSpan]) -> Tensor:
    """[spans, hidden] fp32: each span's hidden states [tokens, hidden], added up."""
    return torch.stack(
        [
            hidden[span.first_token : span.first_token + span.num_tokens].float().sum(0)
            for span in spans
        ]
    )
