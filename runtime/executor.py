"""Runs a plan on a backend: moves, program, sampler. The only part of the runtime with tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from halyard.compiler.captured import CapturedProgram
from halyard.compiler.null_program import NullProgram
from halyard.compiler.program import Program
from halyard.hal.contract import (
    CopyingDevice,
    Device,
    Fetch,
    OverlappingDevice,
    PagedKernels,
    ThriftyDevice,
)
from halyard.hal.errors import CapacityError, DeviceMemoryError
from halyard.hal.memory_errors import is_out_of_memory
from halyard.hal.types import BlockMove, KVPool
from halyard.runtime.batcher import Batcher, PackedStep, PooledSpan
from halyard.runtime.masks import Masks
from halyard.runtime.plan import PlanRow, StepOutput, StepPlan, TokenLogprob
from halyard.runtime.sampler import Draw, Sampler
from halyard.runtime.scores import Scores, score_tokens

__all__ = ["Executor", "PreparedStep", "RunningStep"]

Moves = Sequence[BlockMove]
T = TypeVar("T")

NOT_FINITE = "what the model computed is not finite: its weights may be damaged"


class _Here:
    """A tensor that needs no fetching: work is done when it is issued."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def ready(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._tensor


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step that can be issued: everything the host does for it is done."""

    plan: StepPlan
    packed: PackedStep
    draw: Draw


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that was issued. `wait` brings its results to the host."""

    plan: StepPlan
    token_ids: Tensor | None  # [samples] int64 on the device; None: no row reached its end
    drawn: Fetch | None  # [samples] int64: twice the token, plus one if its logits were bad
    scored: list[int]  # samples that scores are of
    scores: list[Fetch]  # the columns of Scores
    failures: dict[int, str]  # by sample: void, and why
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]]  # by plan row
    pooled_rows: tuple[int, ...]  # plan rows that pool
    pooled: Fetch | None  # [pooled rows, hidden] fp32, sums
    masks: Masks | None = None  # of guided rows

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return all(fetch is None or fetch.ready() for fetch in (self.drawn, self.pooled))

    def wait(self) -> StepOutput:
        """Raises DeviceMemoryError if the device finds only now that its memory is too small."""
        try:
            return self._wait()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(_one_line(error)) from None

    def _wait(self) -> StepOutput:
        rows = self.plan.rows
        drawn = self.drawn.wait() if self.drawn is not None else None
        codes = drawn.tolist() if drawn is not None else []
        drawn_ids = [code >> 1 for code in codes]
        if self.masks is not None:
            self.masks.follow(drawn_ids)
        tokens = _by_row(rows, drawn_ids)
        nothing = (None,) * len(rows)
        logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] = nothing
        if self.scored:
            logprobs = self._logprobs(len(codes))
        errors: dict[int, str] = {}
        if self.failures or any(code & 1 for code in codes):
            numbers = [number for number, row in enumerate(rows) for _ in range(_num_drawn(row))]
            errors = {numbers[sample]: text for sample, text in self.failures.items()}
            errors |= {numbers[sample]: NOT_FINITE for sample, code in enumerate(codes) if code & 1}
        pooled = {}
        if self.pooled is not None:
            for number, vector in zip(self.pooled_rows, self.pooled.wait().numpy(), strict=True):
                pooled[number] = vector
                if not np.isfinite(vector).all():
                    errors[number] = NOT_FINITE
        prompts = self.prompt_logprobs
        return StepOutput(
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(map(prompts.get, range(len(rows)))) if prompts else nothing,
            errors=tuple(errors.items()),
            pooled=pooled,
        )

    def _logprobs(self, num_samples: int) -> tuple[tuple[TokenLogprob, ...] | None, ...]:
        rows = self.plan.rows
        owners = [row.sequence for row in rows for _ in range(_num_drawn(row))]
        tops = [owners[sample].request.params.logprobs or 0 for sample in self.scored]
        listed = Scores(*(column.wait() for column in self.scores)).listed(tops)
        found: list[TokenLogprob | None] = [None] * num_samples
        for sample, logprob in zip(self.scored, listed, strict=True):
            found[sample] = logprob
        return tuple(
            tuple(logprob for logprob in own if logprob is not None) or None
            for own in _by_row(rows, found)
        )


def _by_row(rows: tuple[PlanRow, ...], values: list[T]) -> tuple[tuple[T, ...], ...]:
    """One value a sample -> those of each plan row."""
    if len(values) == len(rows) and all(_num_drawn(row) == 1 for row in rows):
        return tuple(zip(values, strict=True))
    left = iter(values)
    return tuple(tuple(islice(left, _num_drawn(row))) for row in rows)


def _num_drawn(row: PlanRow) -> int:
    return 0 if row.sequence.pools else row.num_samples


def _sums(hidden: Tensor, spans: Sequence[PooledSpan]) -> Tensor:
    """[spans, hidden] fp32: each span's hidden states [tokens, hidden], added up."""
    return torch.stack(
        [
            hidden[span.first_token : span.first_token + span.num_tokens].float().sum(0)
            for span in spans
        ]
    )


class Executor:
    """One backend with a bound program and its pools.

    Args:
        max_blocks: most blocks of a sequence.
        share: let rows that have blocks in common read them together, where the kernels can.
    """

    def __init__(
        self,
        device: Device,
        kernels: PagedKernels,
        program: Program | CapturedProgram | NullProgram,
        pool: KVPool,
        host_pool: KVPool | None,
        sampler: Sampler,
        max_blocks: int,
        share: bool = False,
    ) -> None:
        self.device = device
        self.kernels = kernels
        self.program = program
        self.pool = pool
        self.host_pool = host_pool
        self.sampler = sampler
        # Asked once: a protocol's isinstance takes as long as a small layer.
        self.overlaps = isinstance(device, OverlappingDevice)  # a step may be issued behind another
        self._copying = device if isinstance(device, CopyingDevice) else None
        self._fetching = device if isinstance(device, OverlappingDevice) else None
        self._max_blocks = max_blocks
        self._share = share and getattr(kernels, "reads_shared_rows", False)
        self.batcher = self._make_batcher()
        self.swap_out_seconds = (
            0.0  # on the caller's clock: what issuing took, where moves are issued
        )
        self.swap_in_seconds = 0.0
        self._moved = False  # the block moves of the step that is being issued are made
        self._sizes = (pool.num_blocks, host_pool.num_blocks if host_pool is not None else 0)
        program.set_pool(pool)

    def _make_batcher(self, fitting: bool = False) -> Batcher:
        """fitting: steps aren't widened to what is recorded already."""
        program, size = self.program, self.pool.layout.spec.block_size
        if not isinstance(program, CapturedProgram):
            return Batcher(size, self._max_blocks, share=self._share)
        mixed = None
        if getattr(self.kernels, "takes_empty_rows", False):
            mixed = program.fitting_mixed_shape if fitting else program.mixed_shape

        def fits(rows: int, keys: int, _shares: bool) -> tuple[int, int] | None:
            return program.fitting_shape(rows, keys)

        shape = fits if fitting else program.decode_shape
        return Batcher(size, self._max_blocks, shape, program.buffer, self._share, mixed)

    @torch.inference_mode()
    def rehearse(self, plan: StepPlan, recorded: bool = True) -> float:
        """Run a step of nobody's, with no step in flight, for what that brings about on the device.

        Its tokens have no slots, so that no block changes; what it draws is thrown away. Returns the
        part of its time that the host took to launch it.

        Args:
            plan: rows that draw without penalties or grammars, but may have biases; their blocks are read.
            recorded: as a step is run that the device records or has recorded; else launch by launch.

        Raises:
            DeviceMemoryError: the device's memory is too small for this step.
        """
        if recorded:
            batcher = self._make_batcher(fitting=True)
        else:
            batcher = Batcher(self.pool.layout.spec.block_size, self._max_blocks, share=self._share)
        packed = batcher.pack(plan)
        positions, slot_mapping, *others = packed.arrays
        nowhere = np.full_like(slot_mapping, -1)
        try:
            inputs = replace(packed, arrays=(positions, nowhere, *others)).put(
                self.device.torch_device
            )
            started = time.perf_counter()
            logits = self.program.run(inputs.input_ids, inputs.logit_indices, inputs.batch)
            launched = time.perf_counter()
            logits = logits[: packed.num_logits]
            self.sampler.draw(logits, self.sampler.prepare(packed.samples))
            self.device.synchronize()
            return (launched - started) / (time.perf_counter() - started)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(_one_line(error)) from None

    def run(self, plan: StepPlan, before: RunningStep | None = None) -> RunningStep:
        """Issue a step's work. Order: swap out, swap in, copies, rows.

        Args:
            before: the step in flight, if the plan was made ahead of its tokens.

        Raises:
            DeviceMemoryError: the device's memory is too small for this step.
        """
        self._moved = False
        try:
            return self.issue(self.prepare(plan), before)
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(_one_line(error), self._moved) from None

    def prepare(self, plan: StepPlan) -> PreparedStep:
        """All that the host does for a step: pack its inputs, draw its random numbers."""
        self.sampler.lend()
        packed = self.batcher.pack(plan)
        return PreparedStep(plan, packed, self.sampler.prepare(packed.samples))

    @torch.inference_mode()
    def issue(self, step: PreparedStep, before: RunningStep | None = None) -> RunningStep:
        """All that the device does for it.

        Where the device overlaps, a step of plain rows waits for nothing. Scores of prompts wait for
        the logits, guided rows for their masks; columns of penalties, biases and least lengths are
        copied from memory that isn't pinned, which may wait for the work issued before.
        """
        plan, packed = step.plan, step.packed
        if plan.swap_out or plan.swap_in:
            # What a plan made ahead moves belongs to no row of the step in flight: see check_books.
            with self._beside(before is not None):
                self.move(plan.swap_out, plan.swap_in)
        self.move(copies=plan.copies)
        self._moved = True
        if self.host_pool is not None and self._copying is not None:
            self._copying.mark()
        inputs = packed.put(self.device.torch_device)
        if inputs.places is not None and inputs.sources is not None:
            if before is None or before.token_ids is None:
                raise AssertionError("a row continues a token that nobody samples")
            inputs.input_ids.index_copy_(0, inputs.places, before.token_ids[inputs.sources])
        arguments = (inputs.input_ids, inputs.logit_indices, inputs.batch)
        pooled = None
        if packed.pooled_spans:
            logits, hidden = self.program.run_with_hidden(*arguments)
            pooled = self._fetch(_sums(hidden, packed.pooled_spans))
        else:
            logits = self.program.run(*arguments)
        logits = logits[: packed.num_logits]
        pooled_rows = tuple(span.plan_row for span in packed.pooled_spans)
        scored = self._score_prompts(plan, packed, logits) if packed.prompt_spans else {}
        if not len(packed.samples):
            return RunningStep(plan, None, None, [], [], {}, scored, pooled_rows, pooled)
        sampled = self.sampler.draw(
            logits, step.draw, before.token_ids if before is not None else None
        )
        return RunningStep(
            plan,
            sampled.token_ids,
            self._fetch(
                sampled.token_ids * 2 + sampled.bad if sampled.codes is None else sampled.codes
            ),
            sampled.scored.tolist(),
            [self._fetch(column) for column in sampled.scores.columns] if sampled.scores else [],
            sampled.failures,
            scored,
            pooled_rows,
            pooled,
            step.draw.masks,
        )

    def _beside(self, step: bool) -> AbstractContextManager[None]:
        return self._copying.beside(step) if self._copying is not None else nullcontext()

    def _fetch(self, tensor: Tensor) -> Fetch:
        if self._fetching is not None:
            return self._fetching.fetch(tensor)
        return _Here(tensor)

    def close(self) -> None:
        """Give the device back, empty, even where somebody still holds this object."""
        self._free(torch.device("meta"))
        self.host_pool = None
        self.device.close()

    def forget(self) -> None:
        """Steps came to nothing: what was counted ahead of their tokens is counted anew."""
        self.sampler.forget()

    def sleep(self) -> None:
        """Free the device's memory: its pool, and weights go to the host. No step until `wake`.

        A host tier of other memory stays: what was locked in place for the device isn't given back.
        """
        self._free(torch.device("cpu"))
        if self.device.torch_device.type == "cpu":
            self.host_pool = None
        self._empty_cache()

    def _free(self, weights: torch.device) -> None:
        """Drop the pool and what was recorded on it; weights go where they are told."""
        empty = self.device.allocate_kv(self.pool.layout, 0, host=False)
        self.program.set_pool(empty)
        self.pool = empty
        self.program.move_weights(weights)

    def wake(self) -> None:
        """Take the memory again.

        Raises:
            CapacityError: it isn't there; all is as it was before.
        """
        num_blocks, num_host_blocks = self._sizes
        layout, host_pool = self.pool.layout, self.host_pool
        if num_host_blocks and host_pool is None:
            host_pool = self.device.allocate_kv(layout, num_host_blocks, host=True)
        pool = self.device.allocate_kv(layout, num_blocks, host=False)
        short = self._take_weights_back()
        if short:
            del pool
            self._empty_cache()
            raise CapacityError(f"somebody else has the device's memory: {short}")
        self.pool, self.host_pool = pool, host_pool
        self.program.set_pool(pool)

    def _take_weights_back(self) -> str:
        """Why it can't be; empty: they are on the device."""
        try:
            self.program.move_weights(self.device.torch_device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return _one_line(error)
        return ""

    def _empty_cache(self) -> None:
        if isinstance(self.device, ThriftyDevice):
            self.device.empty_cache()

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
            count = len(span.targets)
            num_top = plan.rows[span.plan_row].sequence.request.params.prompt_logprobs or 0
            scored[span.plan_row] = tuple(
                score_tokens(
                    logits[span.first_logits_row : span.first_logits_row + count],
                    torch.tensor(span.targets, device=logits.device),
                    [num_top] * count,
                )
            )
        return scored


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
