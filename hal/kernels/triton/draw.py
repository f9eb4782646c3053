"""Draws tokens: greedy, or by inverse distribution over what top_k, top_p and min_p leave. No sorting.

Greedy rows are split over programs where rows alone don't fill the chip; the last program of a row
to finish takes the first of the largest. Random rows have one program each. What a filter keeps is all weights from a least one on, and the least weight is
found by halving the range of bit patterns between: positive floats are ordered as their bits are.
Each halving reads the row once, which is in the cache by then.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["CHUNK", "FEW_ROWS_CHUNK", "draw_greedy_kernel", "draw_kernel"]

CHUNK = 4096  # tokens a program looks at together
FEW_ROWS_CHUNK = 16384  # where a program has a multiprocessor to itself
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
def _store(
    tokens: tl.tensor, codes: tl.tensor, bad: tl.tensor, number: tl.tensor, chosen: tl.tensor,
    is_bad: tl.tensor,
) -> None:  # fmt: skip
    tl.store(tokens + number, chosen)
    tl.store(codes + number, chosen.to(tl.int64) * 2 + is_bad.to(tl.int64))
    tl.store(bad + number, is_bad)


# Where rows and results begin changes with every number of rows; nothing is gained by knowing of it.
_ANYWHERE = ["rows", "columns", "tokens", "codes", "bad"]


@triton.jit(do_not_specialize_on_alignment=_ANYWHERE)
def draw_greedy_kernel(
    logits: tl.tensor, rows: tl.tensor, tokens: tl.tensor, codes: tl.tensor, bad: tl.tensor,
    parts: tl.tensor, tickets: tl.tensor, vocab: tl.tensor, row_stride: tl.tensor, piece: tl.tensor,
    GATHER: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, PIECES_PAD: tl.constexpr,
) -> None:  # fmt: skip
    """The first of the largest of each row; arguments and results as draw_kernel's.

    piece: tokens of a program, whole chunks of SIZE. With PIECES > 1: parts int32 [num, 2, PIECES] is
    scratch, tickets int32 [num] zeros, which are zeros again afterwards. Grid: (num, PIECES).
    """
    number = tl.program_id(0)
    own = tl.program_id(1)
    place = number.to(tl.int64)
    if GATHER:
        place = tl.load(rows + number)
    row = logits + place * row_stride
    first = own * piece
    inside = tl.arange(0, SIZE)
    # Each lane keeps its own best; a later one must be larger to take its place.
    peaks = tl.full([SIZE], float("-inf"), tl.float32)
    places = first + inside
    broken = tl.zeros([SIZE], tl.int32)
    for start in range(first, tl.minimum(first + piece, vocab), SIZE):
        token = start + inside
        logit = tl.load(row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        broken |= (logit != logit).to(tl.int32)
        larger = logit > peaks  # never so for NaN
        peaks = tl.where(larger, logit, peaks)
        places = tl.where(larger, token, places)
    peak = tl.max(peaks, 0)
    best = tl.min(tl.where(peaks == peak, places, vocab), 0)
    is_broken = tl.max(broken, 0)
    finishes = True
    if PIECES > 1:
        part = parts + number * (2 * PIECES)
        tl.store(part + own, peak.to(tl.int32, bitcast=True))
        tl.store(part + PIECES + own, tl.where(is_broken > 0, -1 - best, best))
        tl.debug_barrier()  # the part is written before its ticket is drawn
        finishes = tl.atomic_add(tickets + number, 1, sem="acq_rel", scope="gpu") == PIECES - 1
    if finishes:
        if PIECES > 1:
            other = tl.arange(0, PIECES_PAD)
            there = other < PIECES
            found = tl.load(part + other, mask=there, other=0, cache_modifier=".cg")
            tops = tl.where(there, found.to(tl.float32, bitcast=True), float("-inf"))
            spot = tl.load(part + PIECES + other, mask=there, other=0, cache_modifier=".cg")
            is_broken = tl.max((spot < 0).to(tl.int32), 0)
            spot = tl.where(spot < 0, -1 - spot, spot)
            peak = tl.max(tops, 0)
            best = tl.min(tl.where(there & (tops == peak), spot, vocab), 0)
            tl.store(tickets + number, 0)
        is_bad = (is_broken > 0) | (peak == float("-inf")) | (peak == float("inf"))
        _store(tokens, codes, bad, number, best, is_bad)


@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=_ANYWHERE)
def draw_kernel(
    logits: tl.tensor, rows: tl.tensor, columns: tl.tensor, tokens: tl.tensor, codes: tl.tensor,
    bad: tl.tensor, vocab: tl.tensor, row_stride: tl.tensor, num: tl.tensor,
    GATHER: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """logits [any, vocab]; rows [num] int64 if GATHER; columns [5, num] fp32: temperature, top_p,
    min_p, top_k, number. Written: tokens [num] int64, bad [num] int8, codes [num] int64 = 2 x token +
    bad. Grid: num.
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
    _store(tokens, codes, bad, number, chosen, is_bad)
