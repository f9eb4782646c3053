"""Draws tokens: greedy, or by inverse distribution over what top_k, top_p and min_p leave. No sorting.

Greedy rows are split over programs where rows alone don't fill the chip; the last program of a row
to finish takes the first of the largest. Random rows have one program each. What a filter keeps is all
weights from a least one on, and the least weight is found by halving the range of bit patterns between:
positive floats are ordered as their bits are. Nearly always a few hundred tokens hold all that a filter
can keep: these are written down, and the halving looks at them alone. Where it is not so (the model knows
nothing) each halving reads the whole row.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "CANDIDATES", "CHUNK", "FEW_ROWS_RANDOM_CHUNK", "RANDOM_CHUNK", "draw_greedy_kernel", "draw_kernel",
]  # fmt: skip

CHUNK = 4096  # tokens of a greedy row that a program looks at together
RANDOM_CHUNK = 2048  # of another one
FEW_ROWS_RANDOM_CHUNK = 4096  # where a program has a multiprocessor to itself
CANDIDATES = 2048  # most tokens that are written down
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
    """How many weights are at least `least`, their sum, the least of them and the largest of the others."""
    counts = tl.zeros([SIZE], tl.float32)
    masses = tl.zeros([SIZE], tl.float32)
    above = tl.full([SIZE], 1.0, tl.float32)
    below = tl.zeros([SIZE], tl.float32)
    for start in range(0, vocab, SIZE):
        weight = _weights(row, start, vocab, peak, scale, SIZE)
        kept = (weight >= least) & (weight > 0.0)
        counts += tl.where(kept, 1.0, 0.0)
        masses += tl.where(kept, weight, 0.0)
        above = tl.where(kept, tl.minimum(above, weight), above)
        below = tl.where(kept, below, tl.maximum(below, weight))
    return tl.sum(counts, 0), tl.sum(masses, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _bound(
    row: tl.tensor, vocab: tl.tensor, peak: tl.tensor, scale: tl.tensor, top_k: tl.tensor,
    top_p: tl.tensor, SIZE: tl.constexpr, MOST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A weight from which on there are at most MOST tokens, and all that the filters can keep, 0: none
    was found; and the sum of all weights.

    top_k: 0: all. It counts before top_p does, which is of what top_k leaves.
    """
    # Negative powers of two that are tried together: what is far from the peak is sparse or a crowd.
    first, second, third, fourth, fifth = 2.0, 5.0, 10.0, 17.0, 26.0
    few = 0.0  # there are too few tokens down to that one
    crowd = 126.0  # and too many down to that one
    bound = 0.0
    total = 0.0
    turn = 0
    while (bound == 0.0) & (turn < 2):
        counts = tl.zeros([SIZE], tl.float32)
        count1, count2, count3, count4, count5 = counts, counts, counts, counts, counts
        mass1, mass2, mass3, mass4, mass5, whole = counts, counts, counts, counts, counts, counts
        least1, least2, least3 = tl.exp2(-first), tl.exp2(-second), tl.exp2(-third)
        least4, least5 = tl.exp2(-fourth), tl.exp2(-fifth)
        for start in range(0, vocab, SIZE):
            weight = _weights(row, start, vocab, peak, scale, SIZE)
            whole += weight
            count1 += tl.where(weight >= least1, 1.0, 0.0)
            mass1 += tl.where(weight >= least1, weight, 0.0)
            count2 += tl.where(weight >= least2, 1.0, 0.0)
            mass2 += tl.where(weight >= least2, weight, 0.0)
            count3 += tl.where(weight >= least3, 1.0, 0.0)
            mass3 += tl.where(weight >= least3, weight, 0.0)
            count4 += tl.where(weight >= least4, 1.0, 0.0)
            mass4 += tl.where(weight >= least4, weight, 0.0)
            count5 += tl.where(weight >= least5, 1.0, 0.0)
            mass5 += tl.where(weight >= least5, weight, 0.0)
        total = tl.sum(whole, 0)
        # A little more than the share: sums in another order must find theirs among the candidates.
        share = tl.where(top_k > 0.0, 0.0, top_p * total * 1.00001)
        for number in tl.static_range(5):
            if number == 0:
                counts, masses, power = count1, mass1, first
            elif number == 1:
                counts, masses, power = count2, mass2, second
            elif number == 2:
                counts, masses, power = count3, mass3, third
            elif number == 3:
                counts, masses, power = count4, mass4, fourth
            else:
                counts, masses, power = count5, mass5, fifth
            count = tl.sum(counts, 0)
            holds = (count >= top_k) & (tl.sum(masses, 0) >= share)
            bound = tl.where((bound == 0.0) & holds & (count <= MOST), tl.exp2(-power), bound)
            few = tl.where(holds, few, tl.maximum(few, power))
            crowd = tl.where(count > MOST, tl.minimum(crowd, power), crowd)
        step = (crowd - few) / 6
        first, second, third = few + step, few + 2 * step, few + 3 * step
        fourth, fifth = few + 4 * step, few + 5 * step
        turn += 1
    return bound, total


@triton.jit
def _write_down(
    row: tl.tensor, vocab: tl.tensor, peak: tl.tensor, scale: tl.tensor, bound: tl.tensor,
    candidates: tl.tensor, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Tokens of at least that weight, in the vocabulary's order, to `candidates`; how many."""
    count = 0
    for start in range(0, vocab, SIZE):
        weight = _weights(row, start, vocab, peak, scale, SIZE)
        kept = weight >= bound
        found = kept.to(tl.int32)
        here = tl.sum(found, 0)
        if here > 0:
            place = count + tl.cumsum(found, 0) - 1
            tl.store(candidates + place, start + tl.arange(0, SIZE), mask=kept)
        count += here
    return count


@triton.jit
def _least(weights: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, total: tl.tensor) -> tl.tensor:
    """The least weight that top_k (0: all) and then top_p keep, of weights [any] that hold all they can.

    total: of all weights, of which these are some.
    """
    within = 0.0
    if top_k > 0.0:
        low = 0
        high = _ONE_BITS
        while low < high:
            middle = high - (high - low) // 2
            enough = tl.sum((weights >= _as_weight(middle)).to(tl.int32), 0) >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        within = _as_weight(low)
    least = within
    if top_p < 1.0:
        low = 0
        high = _ONE_BITS
        whole = total
        if top_k > 0.0:
            whole = tl.sum(tl.where(weights >= within, weights, 0.0), 0)
        while low < high:
            middle = high - (high - low) // 2
            weight = tl.maximum(_as_weight(middle), within)
            enough = tl.sum(tl.where(weights >= weight, weights, 0.0), 0) >= top_p * whole
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        least = tl.maximum(least, _as_weight(low))
    return least


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


@triton.jit
def _peak(
    row: tl.tensor, first: tl.tensor, end: tl.tensor, vocab: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """Of the logits from `first` to before `end`: the largest, the first token that has it, and 1 if some
    logit is no number."""
    inside = tl.arange(0, SIZE)
    # Each lane keeps its own best; a later one must be larger to take its place.
    peaks = tl.full([SIZE], float("-inf"), tl.float32)
    places = first + inside
    broken = tl.zeros([SIZE], tl.int32)
    for start in range(first, end, SIZE):
        token = start + inside
        logit = tl.load(row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        broken |= (logit != logit).to(tl.int32)
        larger = logit > peaks  # never so for NaN
        peaks = tl.where(larger, logit, peaks)
        places = tl.where(larger, token, places)
    peak = tl.max(peaks, 0)
    return peak, tl.min(tl.where(peaks == peak, places, vocab), 0), tl.max(broken, 0)


# Where rows and results begin changes with every number of rows; nothing is gained by knowing of it.
_ANYWHERE = ["rows", "columns", "tokens", "codes", "bad", "candidates"]


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
    peak, best, is_broken = _peak(row, first, tl.minimum(first + piece, vocab), vocab, SIZE)
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


@triton.jit
def _as_bits(weight: tl.tensor) -> tl.tensor:
    return weight.to(tl.int32, bitcast=True)


@triton.jit
def _least_of_all(
    row: tl.tensor, vocab: tl.tensor, peak: tl.tensor, scale: tl.tensor, top_k: tl.tensor,
    top_p: tl.tensor, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As _least, of a whole row. Both ends of the range move to weights that are there: of 16-bit logits
    there are some hundred."""
    within = 0.0
    if top_k > 0.0:
        low = 0
        high = _ONE_BITS  # the largest least weight that leaves top_k tokens
        while low < high:
            middle = high - (high - low) // 2
            count, _, above, below = _count_from(row, vocab, peak, scale, _as_weight(middle), SIZE)
            enough = count >= top_k
            low = tl.where(enough, _as_bits(above), low)
            high = tl.where(enough, high, tl.maximum(_as_bits(below), low))
        within = _as_weight(low)
    least = within
    if top_p < 1.0:
        _, whole, _, _ = _count_from(row, vocab, peak, scale, within, SIZE)
        low = _as_bits(within)
        high = _ONE_BITS  # the largest least weight that leaves top_p of what is there
        while low < high:
            middle = high - (high - low) // 2
            _, mass, above, below = _count_from(row, vocab, peak, scale, _as_weight(middle), SIZE)
            enough = mass >= top_p * whole
            low = tl.where(enough, _as_bits(above), low)
            high = tl.where(enough, high, tl.maximum(_as_bits(below), low))
        least = tl.maximum(least, _as_weight(low))
    return least


@triton.jit
def _draw_from_all(
    row: tl.tensor, vocab: tl.tensor, peak: tl.tensor, scale: tl.tensor, least: tl.tensor,
    number: tl.tensor, best: tl.tensor, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The first token whose sum of weights from `least` on is beyond that part of them all; rounding may
    leave none: then the last."""
    _, mass, _, _ = _count_from(row, vocab, peak, scale, least, SIZE)
    goal = number * mass
    inside = tl.arange(0, SIZE)
    passed = 0.0
    chosen = -1
    last = best
    start = 0
    while (start < vocab) & (chosen < 0):
        weight = _weights(row, start, vocab, peak, scale, SIZE)
        kept = (weight >= least) & (weight > 0.0)
        weight = tl.where(kept, weight, 0.0)
        until = passed + tl.cumsum(weight, 0)
        first = tl.min(tl.where(kept & (until > goal), inside, SIZE), 0)
        chosen = tl.where(first < SIZE, start + first, chosen)
        end = tl.max(tl.where(kept, inside, -1), 0)
        last = tl.where(end >= 0, start + end, last)
        passed += tl.sum(weight, 0)
        start += SIZE
    return tl.where(chosen < 0, last, chosen)


@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=_ANYWHERE)
def draw_kernel(
    logits: tl.tensor, rows: tl.tensor, columns: tl.tensor, tokens: tl.tensor, codes: tl.tensor,
    bad: tl.tensor, candidates: tl.tensor, vocab: tl.tensor, row_stride: tl.tensor, num: tl.tensor,
    GATHER: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr,
) -> None:  # fmt: skip
    """logits [any, vocab]; rows [num] int64 if GATHER; columns [5, num] fp32: temperature, top_p,
    min_p, top_k, number; candidates int32 [num, MOST] is scratch. Written: tokens [num] int64, bad [num]
    int8, codes [num] int64 = 2 x token + bad. Grid: num.
    """
    number = tl.program_id(0)
    place = number.to(tl.int64)
    if GATHER:
        place = tl.load(rows + number)
    row = logits + place * row_stride
    peak, best, broken = _peak(row, 0, vocab, vocab, SIZE)
    best = tl.minimum(best, vocab - 1)
    is_bad = (broken > 0) | (peak == float("-inf")) | (peak == float("inf"))
    chosen = best

    temperature = tl.load(columns + number)
    if (temperature > 0.0) & (is_bad == 0):
        top_p = tl.load(columns + num + number)
        min_p = tl.load(columns + 2 * num + number)
        top_k = tl.load(columns + 3 * num + number)
        goal = tl.load(columns + 4 * num + number)
        scale = 1.4426950408889634 / temperature
        top_k = tl.where(top_k < vocab, top_k, 0.0)
        filters = (top_k > 0.0) | (top_p < 1.0)
        bound = 0.0
        total = 0.0
        if filters:
            bound, total = _bound(row, vocab, peak, scale, top_k, top_p, SIZE, MOST)
        if bound > 0.0:
            own = candidates + number.to(tl.int64) * MOST
            count = _write_down(row, vocab, peak, scale, bound, own, SIZE)
            tl.debug_barrier()  # written before they are read by other threads
            inside = tl.arange(0, MOST)
            there = inside < count
            token = tl.load(own + inside, mask=there, other=0)
            logit = tl.load(row + token, mask=there, other=float("-inf")).to(tl.float32)
            weight = tl.exp2((logit - peak) * scale)
            least = tl.maximum(_least(weight, top_k, top_p, total), min_p)
            kept = there & (weight >= least)
            weight = tl.where(kept, weight, 0.0)
            until = tl.cumsum(weight, 0)
            first = tl.min(tl.where(kept & (until > goal * tl.sum(weight, 0)), inside, MOST), 0)
            last = tl.max(tl.where(kept, inside, 0), 0)
            chosen = tl.sum(tl.where(inside == tl.minimum(first, last), token, 0), 0)
        else:
            least = min_p
            if filters:
                least = tl.maximum(
                    _least_of_all(row, vocab, peak, scale, top_k, top_p, SIZE), min_p
                )
            chosen = _draw_from_all(row, vocab, peak, scale, least, goal, best, SIZE)
    _store(tokens, codes, bad, number, chosen, is_bad)
