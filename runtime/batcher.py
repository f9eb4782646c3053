"""A plan becomes packed tensors. Every tensor of a step is built here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halyard.hal.types import StepBatch
from halyard.runtime.plan import PlanRow, StepPlan

__all__ = ["PackedStep", "PooledSpan", "PromptSpan", "SampleRow", "pack"]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw: the logits row it is drawn from and the answer it continues."""

    row: PlanRow
    answer_index: int  # which of the request's n answers
    logits_row: int  # index into the logits of the step


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Rows of the logits that score prompt tokens of one plan row (prompt_logprobs)."""

    plan_row: int  # index into plan.rows
    first_logits_row: int
    num_tokens: int  # prompt tokens scored; the i-th is at prompt position row.start + 1 + i


@dataclass(frozen=True, slots=True)
class PooledSpan:
    """Tokens of the step whose hidden states are summed for one plan row that pools."""

    plan_row: int  # index into plan.rows
    first_token: int  # of the step
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The inputs of one step on the device."""

    input_ids: Tensor  # [num_tokens] int64
    logit_indices: Tensor  # [num_logits] int64, tokens whose logits are wanted
    batch: StepBatch
    samples: tuple[SampleRow, ...]  # plan row order, then answer order
    prompt_spans: tuple[PromptSpan, ...]
    pooled_spans: tuple[PooledSpan, ...]


def pack(plan: StepPlan, block_size: int, device: torch.device) -> PackedStep:
    """Pack the rows of a plan side by side, without padding."""
    rows = plan.rows
    num_rows = len(rows)
    starts = np.fromiter((row.start for row in rows), np.int64, num_rows)
    counts = np.fromiter((row.num_tokens for row in rows), np.int64, num_rows)
    ends = starts + counts
    query_start = np.zeros(num_rows + 1, np.int64)
    np.cumsum(counts, out=query_start[1:])
    num_tokens = int(query_start[-1])

    blocks_needed = -(-ends // block_size)
    tables = np.full((num_rows, int(blocks_needed.max())), -1, np.int32)
    input_ids = np.empty(num_tokens, np.int64)
    for index, row in enumerate(rows):
        sequence = row.sequence
        tables[index, : blocks_needed[index]] = sequence.block_ids[: blocks_needed[index]]
        first = query_start[index]
        if row.num_tokens == 1:  # decode: no slice objects on the hot path
            input_ids[first] = sequence.token_ids[row.start]
        else:
            input_ids[first : first + row.num_tokens] = sequence.token_ids[row.start : row.end]

    row_of_token = np.repeat(np.arange(num_rows), counts)
    positions = np.arange(num_tokens) + np.repeat(starts - query_start[:-1], counts)
    blocks = tables[row_of_token, positions // block_size].astype(np.int64)
    slot_mapping = blocks * block_size + positions % block_size

    logit_indices, samples, prompt_spans = _wanted_logits(rows, query_start)
    pooled_spans = _pooled_spans(rows, query_start)

    (
        on_positions, on_slots, on_tables, on_lengths, on_starts, on_ids, on_wanted
    ) = _put(
        [positions, slot_mapping, tables, ends.astype(np.int32), query_start.astype(np.int32),
         input_ids, logit_indices], device,
    )  # fmt: skip
    batch = StepBatch(
        num_tokens=num_tokens,
        num_rows=num_rows,
        max_query_len=int(counts.max()),
        max_seq_len=int(ends.max()),
        positions=on_positions,
        slot_mapping=on_slots,
        block_tables=on_tables,
        seq_lens=on_lengths,
        query_start=on_starts,
    )
    return PackedStep(
        input_ids=on_ids,
        logit_indices=on_wanted,
        batch=batch,
        samples=samples,
        prompt_spans=prompt_spans,
        pooled_spans=pooled_spans,
    )


def _put(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device: one copy for all of them where it has memory of its own."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // 16) * 16 for array in arrays]  # kernels read aligned vectors
    staged = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    view = staged.numpy()
    start = 0
    for array, size in zip(arrays, sizes, strict=True):
        view[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        start += size
    there = staged.to(device, non_blocking=True)
    tensors, start = [], 0
    for array, size in zip(arrays, sizes, strict=True):
        own = there[start : start + array.nbytes].view(torch.from_numpy(array).dtype)
        tensors.append(own.view(array.shape))
        start += size
    return tensors


def _wanted_logits(
    rows: tuple[PlanRow, ...], query_start: np.ndarray
) -> tuple[np.ndarray, tuple[SampleRow, ...], tuple[PromptSpan, ...]]:
    """Which tokens need logits: the last of each row that samples, and scored prompt positions."""
    indices: list[int] = []
    samples: list[SampleRow] = []
    spans: list[PromptSpan] = []
    for index, row in enumerate(rows):
        first = int(query_start[index])
        sequence = row.sequence
        if sequence.request.params.prompt_logprobs is not None:
            # The token at position p is predicted by the logits of position p - 1.
            scored = min(row.end, sequence.num_prompt_tokens - 1) - row.start
            if scored > 0:
                spans.append(PromptSpan(index, len(indices), scored))
                indices.extend(range(first, first + scored))
        if row.num_samples and sequence.request.pooling is None:
            logits_row = len(indices)
            indices.append(first + row.num_tokens - 1)
            samples.extend(
                SampleRow(row, sequence.index + answer, logits_row)
                for answer in range(row.num_samples)
            )
    if not indices:  # programs are traced for at least one row of logits; this one is thrown away
        indices.append(0)
    return np.array(indices, np.int64), tuple(samples), tuple(spans)


def _pooled_spans(rows: tuple[PlanRow, ...], query_start: np.ndarray) -> tuple[PooledSpan, ...]:
    """All tokens of rows for a mean; the last token of a prompt where that is wanted."""
    spans = []
    for index, row in enumerate(rows):
        pooling = row.sequence.request.pooling
        if pooling == "mean":
            spans.append(PooledSpan(index, int(query_start[index]), row.num_tokens))
        elif pooling == "last" and row.num_samples:
            spans.append(PooledSpan(index, int(query_start[index + 1]) - 1, 1))
    return tuple(spans)
