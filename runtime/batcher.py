"""A plan becomes packed tensors. Every tensor of a step is built here, and nowhere else.

Nothing is kept of a step but the rows' tables (row_table.py), and what a step is given are copies:
it may run after the next one has been packed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halyard.hal.types import SharedRows, StepBatch
from halyard.runtime.plan import PlanRow, StepPlan
from halyard.runtime.row_table import RowTable
from halyard.runtime.samples import Samples
from halyard.runtime.sequence import Sequence
from halyard.runtime.shared_rows import filled_up, find_shared_rows

__all__ = [
    "Arena",
    "Batcher",
    "PackedStep",
    "PooledSpan",
    "PromptSpan",
    "StepInputs",
    "locked",
    "send",
    "stage",
]

_ALIGNMENT = 16  # bytes: kernels read aligned vectors
_MOST_VIEWS = 1024  # kept; they are small


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Rows of the logits that score prompt tokens of one plan row (prompt_logprobs)."""

    plan_row: int  # index into plan.rows
    first_logits_row: int
    targets: tuple[int, ...]  # the prompt tokens scored, from position row.start + 1 on


@dataclass(frozen=True, slots=True)
class PooledSpan:
    """Tokens of the step whose hidden states are summed for one plan row that pools."""

    plan_row: int  # index into plan.rows
    first_token: int  # of the step
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one step on the device."""

    input_ids: Tensor  # [num_tokens] int64; where a token is pending, any
    logit_indices: Tensor  # [num_logits] int64, tokens whose logits are wanted
    batch: StepBatch
    places: Tensor | None  # [n] int64, where in input_ids tokens are pending; None: nowhere
    sources: Tensor | None  # [n] int64, which samples of the step before these are


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The inputs of one step on the host. `put` them when the step's turn on the device has come."""

    arrays: tuple[NDArray[Any], ...]  # as StepInputs has them, see put
    max_query_len: int
    max_seq_len: int
    arena: Arena | None  # where a recorded step reads them; None: anywhere
    num_logits: int  # rows of the logits that mean something; what follows fills up
    samples: Samples
    prompt_spans: tuple[PromptSpan, ...]
    pooled_spans: tuple[PooledSpan, ...]
    shares: bool = False  # arrays hold SharedRows behind the tables

    def put(self, device: torch.device) -> StepInputs:
        """One copy for all of them, where the device has memory of its own."""
        on = stage(self.arrays, device, self.arena)
        positions, slot_mapping, input_ids, indices, lengths, query_start, tables = on[:7]
        more = list(on[7:])
        shared = SharedRows(*(more.pop(0) for _ in range(3))) if self.shares else None
        batch = StepBatch(
            num_tokens=len(positions),
            num_rows=len(lengths),
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=tables,
            seq_lens=lengths,
            query_start=query_start,
            shared=shared,
        )
        places, sources = more or (None, None)
        return StepInputs(input_ids, indices, batch, places, sources)


class Batcher:
    """Packs the rows of plans side by side.

    Args:
        max_blocks: most blocks of a sequence.
        recorded: (rows, most keys of a row, whether they share blocks) of a decode step -> rows and
            keys, rounded up to a step that the device has recorded or would record; None: it records
            none.
        mixed: (tokens, rows, logits, most keys of a row) of a step with prompts -> tokens, rows and
            keys that it is filled up to, likewise; None: such steps are not recorded.
        buffer: where recorded steps read their inputs, uint8 on the device.
        share: look for rows that have blocks in common, for kernels that make use of it.
    """

    def __init__(
        self,
        block_size: int,
        max_blocks: int,
        recorded: Callable[[int, int, bool], tuple[int, int] | None] | None = None,
        buffer: Tensor | None = None,
        share: bool = False,
        mixed: Callable[[int, int, int, int], tuple[int, int, int] | None] | None = None,
    ) -> None:
        self._share = share
        self._mixed = mixed
        self._shared: dict[int, tuple[NDArray[np.int32], ...]] = {}  # by number of rows
        self._shared_version = -1  # of the table that it was found in
        self._size = block_size
        self._recorded = recorded
        self._arena = Arena(buffer) if buffer is not None else None
        self._table = RowTable(max_blocks)

    def release(self) -> None:
        """With nothing running: keep nothing of what ran."""
        self._table.release()

    def pack(self, plan: StepPlan) -> PackedStep:
        """The inputs of a step."""
        rows = plan.rows
        sequences, first, tokens, sampled, source = zip(*rows, strict=True)
        starts, size = np.array(first, np.int64), self._size
        pending = np.array(source, np.int64)
        if plan.num_tokens == plan.num_samples == len(rows) and max(sampled) == 1:
            slots = self._table.slots(sequences, starts // size + 1)
            return self._pack_decode(sequences, starts, slots, pending)
        counts = np.array(tokens, np.int64)
        ends = starts + counts
        num_blocks = -(-ends // size)
        slots = self._table.slots(sequences, num_blocks)
        query_start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        tables = self._table.tables[slots, : int(num_blocks.max())]
        row_of_token = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(plan.num_tokens) + np.repeat(starts - query_start[:-1], counts)
        blocks = tables[row_of_token, positions // size].astype(np.int64)
        indices, samples, spans = self._wanted_logits(rows, query_start, slots)
        count, keys = len(indices), int(ends.max())
        slot_mapping = blocks * size + positions % size
        input_ids, lengths = _known_tokens(rows, query_start), ends.astype(np.int32)
        pooled = _pooled_spans(rows, query_start)
        missing = _pending(pending, query_start)
        begins, longest = query_start.astype(np.int32), int(counts.max())
        shape = None
        if self._mixed is not None and not pooled and count <= len(rows):
            shape = self._mixed(plan.num_tokens, len(rows), count, keys)
        if shape is not None:  # tokens that fill up are no row's, rows that do have no tokens
            num_tokens, num_rows, keys = shape
            positions = _filled(positions, num_tokens, 0)
            slot_mapping = _filled(slot_mapping, num_tokens, -1)
            input_ids = _filled(input_ids, num_tokens, 0)
            indices, lengths = _filled(indices, num_rows, 0), _filled(lengths, num_rows, 0)
            begins = _filled(begins, num_rows + 1, int(begins[-1]))
            tables = _filled(self._table.tables[slots, : -(-keys // size)], num_rows, 0)
            longest = num_tokens
        return PackedStep(
            (positions, slot_mapping, input_ids, indices, lengths, begins, tables, *missing),
            longest,
            keys,
            self._arena if shape is not None else None,
            count,
            samples,
            spans,
            pooled,
        )

    def _pack_decode(
        self,
        sequences: tuple[Sequence, ...],
        starts: NDArray[np.int64],
        slots: NDArray[np.int64],
        pending: NDArray[np.int64],
    ) -> PackedStep:
        """A step of one token a row, each of them followed by one sample."""
        num, size, keys = len(sequences), self._size, int(starts.max()) + 1
        shared = self._shared_rows(slots, starts, num) if self._share else ()
        shape = self._recorded(num, keys, bool(shared)) if self._recorded is not None else None
        rows, keys = shape or (num, keys)
        ends = starts + 1
        records = self._table.records[slots]
        tables = self._table.tables[slots, : -(-keys // size)]
        index = np.arange(rows + 1)
        written = tables[index[:num], starts // size] * np.int64(size) + starts % size
        if shared and rows > num:
            shared = self._shared_rows(slots, starts, rows)
        input_ids = np.array([sequence.token_ids[-1] for sequence in sequences], np.int64)
        lengths = ends.astype(np.int32)
        if rows > num:  # rows that only fill up: no slot, one key
            starts, written, input_ids, lengths, tables = (
                _filled(array, rows, value)
                for array, value in (
                    (starts, 0), (written, -1), (input_ids, 0), (lengths, 1), (tables, 0)
                )
            )  # fmt: skip
        return PackedStep(
            (
                starts,
                written,
                input_ids,
                index[:rows],
                lengths,
                index.astype(np.int32),
                tables,
                *shared,
                *_pending(pending, index),
            ),
            1,
            keys,
            self._arena if shape is not None else None,
            num,
            Samples(sequences, ends, records["index"], index[:num], True, records, pending),
            (),
            (),
            bool(shared),
        )

    def _shared_rows(
        self, slots: NDArray[np.int64], starts: NDArray[np.int64], rows: int
    ) -> tuple[NDArray[np.int32], ...]:
        """For so many rows, of which the first have slots. As long as the same rows decode, what they
        share stays the same."""
        if self._shared_version != self._table.version:
            tables = self._table.tables[slots, : int(starts.max()) // self._size + 1]
            self._shared = {len(slots): find_shared_rows(tables, starts, self._size) or ()}
            self._shared_version = self._table.version
        found = self._shared.get(rows)
        if found is None:
            found = self._shared[rows] = filled_up(self._shared[len(slots)], rows)
        return found

    def _wanted_logits(
        self, rows: tuple[PlanRow, ...], query_start: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Samples, tuple[PromptSpan, ...]]:
        """Which tokens need logits: the last of each row that samples, and scored prompt positions."""
        indices: list[int] = []
        spans: list[PromptSpan] = []
        drawn: list[tuple[int, int, int]] = []  # plan row, answer after the row's own, logits row
        last = query_start.tolist()
        for index, row in enumerate(rows):
            sequence = row.sequence
            if sequence.request.params.prompt_logprobs is not None:
                # The token at position p is predicted by the logits of position p - 1.
                scored = min(row.end, sequence.num_prompt_tokens - 1) - row.start
                if scored > 0:
                    targets = sequence.token_ids[row.start + 1 : row.start + 1 + scored]
                    spans.append(PromptSpan(index, len(indices), tuple(targets)))
                    indices.extend(range(last[index], last[index] + scored))
            if row.num_samples and not sequence.pools:
                drawn.extend((index, answer, len(indices)) for answer in range(row.num_samples))
                indices.append(last[index + 1] - 1)
        count = len(indices)
        if not indices:  # programs are traced for at least one row of logits; this is thrown away
            indices.append(0)
        plan_rows, answers, logits_rows = np.array(drawn, np.int64).reshape(-1, 3).T
        records = self._table.records[slots[plan_rows]]
        samples = Samples(
            [rows[index].sequence for index, _, _ in drawn],
            np.array([rows[index].end for index, _, _ in drawn], np.int64),
            records["index"] + answers,
            logits_rows,
            len(drawn) == count and bool((logits_rows == np.arange(count)).all()),
            records,
            np.array([rows[index].source for index, _, _ in drawn], np.int64),
        )
        return np.array(indices, np.int64), samples, tuple(spans)


def _pending(sources: NDArray[np.int64], query_start: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Where tokens are pending and which samples they are; nothing if none is."""
    rows = np.flatnonzero(sources >= 0)
    return [query_start[rows], sources[rows]] if len(rows) else []


def _filled(array: NDArray[Any], rows: int, value: int) -> NDArray[Any]:
    more = np.full((rows - len(array), *array.shape[1:]), value, array.dtype)
    return np.concatenate([array, more])


def _known_tokens(rows: tuple[PlanRow, ...], query_start: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tokens of all rows side by side; where one is pending, the one before it."""
    input_ids = np.empty(int(query_start[-1]), np.int64)
    for row, first in zip(rows, query_start.tolist(), strict=False):
        if row.num_tokens == 1:  # decode: no slice objects
            position = row.start if row.source < 0 else -1
            input_ids[first] = row.sequence.token_ids[position]
        else:
            input_ids[first : first + row.num_tokens] = row.sequence.token_ids[row.start : row.end]
    return input_ids


def _pooled_spans(
    rows: tuple[PlanRow, ...], query_start: NDArray[np.int64]
) -> tuple[PooledSpan, ...]:
    """All tokens of rows for a mean; the last token of a prompt where that is wanted."""
    spans = []
    for index, row in enumerate(rows):
        if not row.sequence.pools:
            continue
        if row.sequence.request.pooling == "mean":
            spans.append(PooledSpan(index, int(query_start[index]), row.num_tokens))
        elif row.num_samples:
            spans.append(PooledSpan(index, int(query_start[index + 1]) - 1, 1))
    return tuple(spans)


class Arena:
    """Memory on the device that inputs are written to, always at the same places for equal shapes.

    Args:
        memory: uint8 on the device.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._views: dict[tuple[Any, ...], list[Tensor]] = {}

    def views(self, arrays: Rows[NDArray[Any]]) -> list[Tensor]:
        """Where such arrays lie. Made once: a step would spend more on this than on its copy."""
        key = tuple((array.shape, array.dtype.char) for array in arrays)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            found = self._views[key] = _views(self.memory, arrays)
        return found


def stage(
    arrays: Rows[NDArray[Any]], device: torch.device, into: Arena | None = None
) -> list[Tensor]:
    """The arrays on the device: one copy for all of them where it has memory of its own."""
    if device.type == "cpu" and into is None:
        return [torch.from_numpy(array) for array in arrays]
    size = sum(_room(array) for array in arrays)
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
    view = staged.numpy()
    start = 0
    for array in arrays:
        end = start + array.nbytes
        view[start:end].view(array.dtype).reshape(array.shape)[...] = array
        start += _room(array)
    if into is None:
        return _views(staged.to(device, non_blocking=True), arrays)
    into.memory[:size].copy_(staged, non_blocking=True)
    return into.views(arrays)


def locked(shape: tuple[int, int]) -> NDArray[np.int32]:
    """Room for int32 that a GPU copies from without the host's help: see send."""
    made: NDArray[np.int32] = torch.empty(shape, dtype=torch.int32, pin_memory=True).numpy()
    return made


def send(array: NDArray[np.int32], device: torch.device) -> Tensor:
    """An array on the device. One that is `locked` isn't copied on the host: its owner keeps it as it is
    until the step that it is for is done."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu" or not tensor.is_pinned():
        return stage([array], device)[0]
    return tensor.to(device, non_blocking=True)


def _room(array: NDArray[Any]) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


def _views(memory: Tensor, arrays: Rows[NDArray[Any]]) -> list[Tensor]:
    tensors, start = [], 0
    for array in arrays:
        own = memory[start : start + array.nbytes].view(torch.from_numpy(array).dtype)
        tensors.append(own.view(array.shape))
        start += _room(array)
    return tensors
