"""Draws tokens: greedy, or by inverse distribution over what top_k, top_p and min_p leave. No sorting.

One program a row. What a filter keeps is all weights from a least one on, and the least weight is
found by halving the range of bit patterns between: positive floats are ordered as their bits are.
Each halving reads the row once, which is in the cache by then.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["CHUNK", "draw_kernel"]

CHUNK = 4096  # tokens a program looks at together
_ONE_BITS = tl.constexpr(0x3F800000)  # of 1.0, the weight of the most likely token


@triton.jit
def _weights(
    row: tl.tensor, start: tl.tensor, vocab: tl.tensor, peak: tl.tensor, scale: tl.tensor,
    SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Relative to the most likely token, of SIZE tokens from `start` on; past the end: 0."""
    token = start + tl.arange(0, SIZE)
    logit = tl.load(row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    return tl.exp2((logit - peak) * scale)


@triton.jit
def _count_from(
    row: tl.tensor, vocab: tl.tensor, peak: tl.tensor, scale: tl.tensor, least: tl.tensor,
    SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """How many weights are at least `least`, and their sum."""
    count = 0.0
    mass = 0.0
    for start in range(0, vocab, SIZE):
        weight = _weights(row, start, vocab, peak, scale, SIZE)
        kept = (weight >= least) & (weight > 0.0)
        count += tl.sum(tl.where(kept, 1.0, 0.0), 0)
        mass += tl.sum(tl.where(kept, weight, 0.0), 0)
    return count, mass


@triton.jit
def _as_weight(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def draw_kernel(
    logits: tl.tensor, rows: tl.tensor, columns: tl.tensor, tokens: tl.tensor, bad: tl.tensor,
    vocab: tl.tensor, row_stride: tl.tensor, num: tl.tensor,
    GATHER: tl.constexpr, RANDOM: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """logits [any, vocab]; rows [num] int64 if GATHER; columns [5, num] fp32 if RANDOM: temperature,
    top_p, min_p, top_k, number; tokens [num] int64 and bad [num] int8 are written. Grid: num.
    """
    number = tl.program_id(0)
    place = number.to(tl.int64)
    if GATHER:
        place = tl.load(rows + number)
    row = logits + place * row_stride

    # The first of the largest; NaN anywhere makes the row bad.
    peak = float("-inf")
    best = 0
    broken = 0
    for start in range(0, vocab, SIZE):
        token = start + tl.arange(0, SIZE)
        logit = tl.load(row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        broken += tl.sum((logit != logit).to(tl.int32), 0)
        logit = tl.where(logit != logit, float("-inf"), logit)
        top = tl.max(logit, 0)
        where = tl.argmax(logit, 0, tie_break_left=True)
        best = tl.where(top > peak, start + where, best)
        peak = tl.maximum(top, peak)
    is_bad = (broken > 0) | (peak == float("-inf")) | (peak == float("inf"))
    chosen = best

    if RANDOM:
        temperature = tl.load(columns + number)
        if (temperature > 0.0) & (is_bad == 0):
            top_p = tl.load(columns + num + number)
            min_p = tl.load(columns + 2 * num + number)
            top_k = tl.load(columns + 3 * num + number)
            goal = tl.load(columns + 4 * num + number)
            scale = 1.4426950408889634 / temperature
            least = min_p
            if (top_k > 0.0) & (top_k < vocab):
                low = 0
                high = _ONE_BITS  # the largest least weight that leaves top_k tokens
                while low < high:
                    middle = high - (high - low) // 2
                    weight = _as_weight(middle)
                    count, mass = _count_from(row, vocab, peak, scale, weight, SIZE)
                    enough = count >= top_k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle - 1)
                least = tl.maximum(least, _as_weight(low))
                within = _as_weight(low)
            else:
                within = 0.0
            if top_p < 1.0:
                count, whole = _count_from(row, vocab, peak, scale, within, SIZE)
                low = 0
                high = _ONE_BITS  # the largest least weight that leaves top_p of what is there
                while low < high:
                    middle = high - (high - low) // 2
                    weight = tl.maximum(_as_weight(middle), within)
                    count, mass = _count_from(row, vocab, peak, scale, weight, SIZE)
                    enough = mass >= top_p * whole
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle - 1)
                least = tl.maximum(least, _as_weight(low))
            count, mass = _count_from(row, vocab, peak, scale, least, SIZE)
            goal = goal * mass
            # The first token whose sum is beyond the goal; rounding may leave none: then the last.
            passed = 0.0
            chosen = -1
            last = best
            for start in range(0, vocab, SIZE):
                weight = _weights(row, start, vocab, peak, scale, SIZE)
                kept = (weight >= least) & (weight > 0.0)
                weight = tl.where(kept, weight, 0.0)
                inside = tl.arange(0, SIZE)
                until = passed + tl.cumsum(weight, 0)
                first = tl.min(tl.where(kept & (until > goal), inside, SIZE), 0)
                chosen = tl.where((chosen < 0) & (first < SIZE), start + first, chosen)
                end = tl.max(tl.where(kept, inside, -1), 0)
                last = tl.where(end >= 0, start + end, last)
                passed += tl.sum(weight, 0)
            chosen = tl.where(chosen < 0, last, chosen)
    tl.store(tokens + number, chosen)
    tl.store(bad + number, is_bad)
