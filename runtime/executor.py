"""Runs a plan on a backend: moves, program, sampler. The only part of the runtime with tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

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
from halyard.hal.memory_errors import is_out_of_memory, one_line
from halyard.hal.types import BlockMove, KVPool
from halyard.runtime.batcher import Batcher, PackedStep, PooledSpan, stage
from halyard.runtime.plan import StepPlan
from halyard.runtime.running import Drawn, Here, PromptScores, RunningStep
from halyard.runtime.sampler import Draw, Sampler
from halyard.runtime.scores import score

__all__ = ["Executor", "PreparedStep"]

Moves = Sequence[BlockMove]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step that can be issued: everything the host does for it is done."""

    plan: StepPlan
    packed: PackedStep
    draw: Draw


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
            raise DeviceMemoryError(one_line(error)) from None

    def run(
        self, plan: StepPlan, before: RunningStep | None = None
    ) -> tuple[PreparedStep, RunningStep]:
        """Issue a step's work. Order: swap out, swap in, copies, rows.

        Args:
            before: the step in flight, if the plan was made ahead of its tokens.

        Raises:
            DeviceMemoryError: the device's memory is too small for this step.
        """
        self._moved = False
        try:
            step = self.prepare(plan)
            return step, self.issue(step, before)
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(one_line(error), self._moved) from None

    def prepare(self, plan: StepPlan) -> PreparedStep:
        """All that the host does for a step: pack its inputs, draw its random numbers."""
        packed = self.batcher.pack(plan)
        return PreparedStep(plan, packed, self.sampler.prepare(packed.samples))

    @torch.inference_mode()
    def issue(self, step: PreparedStep, before: RunningStep | None = None) -> RunningStep:
        """All that the device does for it, but for the draws of a step that waits for masks: see draw.

        Where the device overlaps, the host waits for nothing but masks that began with the step.
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
        scores = self._score_prompts(plan, packed, logits) if packed.prompt_spans else {}
        running = RunningStep(plan, scores, pooled_rows, pooled)
        if len(packed.samples):
            tokens = before.token_ids if before is not None else None

            def draw(how: Draw) -> Drawn:
                return self._draw(logits, how, tokens)

            running.undrawn = draw
            if not step.draw.waits:
                running.draw(step.draw)
        return running

    def launched(self, waited: bool) -> None:
        """The step issued last is launched; `waited`: the device has done the one before it already."""
        if isinstance(self.program, CapturedProgram):
            self.program.launched(waited)

    def draw(self, step: PreparedStep, running: RunningStep) -> None:
        """Issue the draws of a step that was issued before its guided rows' last tokens were known: they
        are now. Waits for their masks. Does nothing where the draws were issued with the step.

        Raises:
            DeviceMemoryError: the device's memory is too small for them.
        """
        if step.draw.waits:
            try:
                running.draw(self.sampler.complete(step.draw))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise DeviceMemoryError(one_line(error)) from None

    @torch.inference_mode()
    def _draw(self, logits: Tensor, how: Draw, before: Tensor | None) -> Drawn:
        sampled = self.sampler.draw(logits, how, before)
        return Drawn(
            sampled.token_ids,
            self._fetch(
                sampled.token_ids * 2 + sampled.bad if sampled.codes is None else sampled.codes
            ),
            sampled.scored.tolist(),
            [self._fetch(column) for column in sampled.scores.columns] if sampled.scores else [],
            sampled.failures,
            how.masks,
        )

    def _beside(self, step: bool) -> AbstractContextManager[None]:
        return self._copying.beside(step) if self._copying is not None else nullcontext()

    def _fetch(self, tensor: Tensor) -> Fetch:
        if self._fetching is not None:
            return self._fetching.fetch(tensor)
        return Here(tensor)

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
            return one_line(error)
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
    ) -> dict[int, PromptScores]:
        scores = {}
        for span in packed.prompt_spans:
            num_top = plan.rows[span.plan_row].sequence.request.params.prompt_logprobs or 0
            (targets,) = stage([np.array(span.targets, np.int64)], logits.device)
            own = logits[span.first_logits_row : span.first_logits_row + len(targets)]
            columns = score(own, targets, num_top).columns
            scores[span.plan_row] = PromptScores([self._fetch(one) for one in columns], num_top)
        return scores
