"""Decode steps recorded once and replayed: on a GPU a step's launches then cost one call.

A recording is made for a number of rows and a reach of keys, both rounded up, when such a step first
comes. Inputs live in buffers of fixed places; rows that only fill up a recording have no slot and
one key, and nobody reads what they get.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from halyard.compiler.program import Program
from halyard.hal import fallbacks
from halyard.hal.contract import Device
from halyard.hal.types import KVPool, StepBatch

__all__ = ["CapturedProgram", "row_buckets"]

_SHORTEST_REACH = 512  # keys


def row_buckets(max_rows: int) -> list[int]:
    """Row counts that are recorded: close together where padding would cost most."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows + 32, 32)]
    return sorted({*(n for n in steps if n < max_rows), max_rows})


class CapturedProgram:
    """A Program that replays its decode steps where the device can record them."""

    def __init__(
        self, program: Program, device: Device, max_rows: int, max_blocks: int, block_size: int
    ) -> None:
        self.vocab_size = program.vocab_size
        self.weight_bytes = program.weight_bytes
        self._program = program
        self._device = device
        self._max_keys = max_blocks * block_size
        self._buckets = row_buckets(max_rows)
        self._replays: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._enabled = True

        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)

        self._ids = buffer(max_rows, dtype=torch.int64)
        self._positions = buffer(max_rows, dtype=torch.int64)
        self._wanted = buffer(max_rows, dtype=torch.int64)
        self._slots = buffer(max_rows, dtype=torch.int64)
        self._tables = buffer(max_rows, max_blocks, dtype=torch.int32)
        self._lengths = buffer(max_rows, dtype=torch.int32)
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32).to(device.torch_device)

    @property
    def num_recordings(self) -> int:
        return len(self._replays)

    def set_pool(self, pool: KVPool) -> None:
        """Where keys and values live; recordings of another pool are void."""
        self._program.set_pool(pool)
        self._replays.clear()

    @torch.inference_mode()
    def run(self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch) -> Tensor:
        """As Program.run. The logits are valid until the next call."""
        rows = batch.num_rows
        decodes = batch.max_query_len == 1 and logit_indices.shape[0] == rows
        if not (self._enabled and decodes and rows <= self._buckets[-1]):
            return self._program.run(input_ids, logit_indices, batch)
        bucket = self._buckets[bisect_left(self._buckets, rows)]
        reach = _SHORTEST_REACH
        while reach < batch.max_seq_len:
            reach *= 2
        reach = min(reach, self._max_keys)
        self._fill(input_ids, logit_indices, batch, bucket)
        recorded = self._replays.get((bucket, reach))
        if recorded is None:
            recorded = self._record(bucket, reach)
            if recorded is None:
                return self._program.run(input_ids, logit_indices, batch)
        replay, logits = recorded
        replay()
        return logits[:rows]

    def run_with_hidden(
        self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch
    ) -> tuple[Tensor, Tensor]:
        """As Program.run_with_hidden: never replayed, recordings keep no hidden states."""
        return self._program.run_with_hidden(input_ids, logit_indices, batch)

    def _fill(
        self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch, bucket: int
    ) -> None:
        rows, width = batch.block_tables.shape
        self._ids[:rows].copy_(input_ids)
        self._positions[:rows].copy_(batch.positions)
        self._wanted[:rows].copy_(logit_indices)
        self._slots[:rows].copy_(batch.slot_mapping)
        self._tables[:rows, :width].copy_(batch.block_tables)
        self._lengths[:rows].copy_(batch.seq_lens)
        if rows < bucket:
            self._slots[rows:bucket].fill_(-1)
            self._lengths[rows:bucket].fill_(1)
            self._tables[rows:bucket, 0].fill_(0)

    def _record(self, bucket: int, reach: int) -> tuple[Callable[[], None], Tensor] | None:
        batch = StepBatch(
            num_tokens=bucket,
            num_rows=bucket,
            max_query_len=1,
            max_seq_len=reach,
            positions=self._positions[:bucket],
            slot_mapping=self._slots[:bucket],
            block_tables=self._tables[:bucket],
            seq_lens=self._lengths[:bucket],
            query_start=self._starts[: bucket + 1],
        )
        made: list[Tensor] = []

        def step() -> None:
            made.append(self._program.run(self._ids[:bucket], self._wanted[:bucket], batch))

        replay = self._device.capture(step)
        if replay is None:
            self._enabled = False
            fallbacks.note(
                "graph_capture",
                "decode steps are launched one kernel at a time: the device could not record one",
            )
            return None
        self._replays[bucket, reach] = (replay, made[-1])
        return self._replays[bucket, reach]
