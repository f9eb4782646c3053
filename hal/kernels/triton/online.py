"""The loop that every attention kernel here shares: online softmax over tiles of paged keys.

Scores are kept in base 2 (log2 e is folded into the scale), sums and outputs in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LOG2E", "attend_tiles", "finish_softmax"]

LOG2E = 1.4426950408889634
_TWO_LOG2E = tl.constexpr(2.0 * LOG2E)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    # 1 - e cancels for small x, where the series is exact to a rounding.
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    e = tl.exp2(-tl.abs(x) * _TWO_LOG2E)
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def attend_tiles(
    q: tl.tensor, acc: tl.tensor, total: tl.tensor, peak: tl.tensor,
    keys: tl.tensor, values: tl.tensor, table: tl.tensor, begin: tl.tensor, end: tl.tensor, position: tl.tensor, window: tl.tensor,
    qk_scale: tl.tensor, cap_scale: tl.tensor,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Fold the keys begin .. end - 1 of one sequence and one kv head into (acc, total, peak).

    q [M, DIM_PAD] as stored; acc [M, DIM_PAD], total [M], peak [M] fp32; position [M] of each query;
    keys, values: element pointers to that head in block 0. MASKED: some key may be past the end or
    past a query.
    """
    dim = tl.arange(0, DIM_PAD)
    # Where the next tile lies is read one step ahead: were it read in the step that uses it, the
    # compiler would spend a stage of the pipeline on it and keep fewer tiles of keys in flight.
    key = begin + tl.arange(0, BLOCK_N)
    block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # A tile spans several blocks: each of its rows finds its own.
        offset = block.to(tl.int64) * BLOCK_STRIDE + (key % BLOCK_SIZE) * HEAD_DIM
        offset = offset[:, None] + dim[None, :]
        after = key + BLOCK_N
        block = tl.load(table + after // BLOCK_SIZE, mask=after < end, other=0)
        if MASKED or DIM_PAD != HEAD_DIM:
            # Slots past the end may hold anything, NaN too: they must not be read.
            inside = (key < end)[:, None] & (dim < HEAD_DIM)[None, :]
            k = tl.load(keys + offset, mask=inside, other=0.0)
            v = tl.load(values + offset, mask=inside, other=0.0)
        else:
            k = tl.load(keys + offset)
            v = tl.load(values + offset)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        scale = qk_scale
        if SOFTCAP:
            score = cap_scale * _tanh(score * qk_scale)
            scale = 1.0
        if MASKED:
            visible = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                visible &= position[:, None] - key[None, :] < window
            score = tl.where(visible, score, float("-inf"))
        # The scale is positive, so the largest stays the largest: it is multiplied in afterwards, once a
        # row here, and with the subtraction below in one instruction.
        new_peak = tl.maximum(peak, tl.max(score, 1) * scale)
        # With a window a query may have seen nothing yet: -inf - -inf would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if HAS_WINDOW else new_peak
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(score * scale - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit
def finish_softmax(
    acc: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    sinks: tl.tensor,
    heads: tl.tensor,
    valid: tl.tensor,
    SINKS: tl.constexpr,
) -> tl.tensor:
    """The normalised output [M, DIM_PAD], after the heads' extra logits joined the sum."""
    if SINKS:
        sink = tl.load(sinks + heads, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        new_peak = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.exp2(sink - new_peak)
        acc = acc * shrink[:, None]
    total = tl.where(total == 0.0, 1.0, total)  # a row without keys: zeros, not NaN
    return acc / total[:, None]
