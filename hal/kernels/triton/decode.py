"""Decode: one query a row, its keys split over the chip and merged by log-sum-exp.

One program per (row, kv head, split). The query heads that share a kv head are the rows of one
matrix tile, so keys are read once for all of them. Lengths and block tables are read on the device
and the grid follows from shapes alone: a captured launch replays with other lengths.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from halyard.hal.kernels.triton.online import attend_tiles, finish_softmax

__all__ = ["MAX_SPLITS", "choose_splits", "merge_kernel", "paged_decode_kernel"]

MAX_SPLITS = 128
_PROGRAMS_PER_CORE = 2  # what shared memory lets reside at once, with the tiles of tiles.py
_PROGRAM_COST = 3  # starting and ending a program, in tiles
_MERGE_COST = 4  # the second launch, in tiles


@cache
def choose_splits(
    num_rows: int, heads_per_row: int, max_keys: int, block_n: int, num_cores: int,
    per_core: int = _PROGRAMS_PER_CORE,
) -> int:  # fmt: skip
    """How many programs share one row's keys; a pure function, so a captured step can rely on it.

    Args:
        heads_per_row: programs a row has anyway: kv heads times tiles of their group.
        max_keys: keys that a row may have; taken up to the next power of two.
        per_core: programs that a multiprocessor has room for at once.
    """
    tiles = -(-(1 << max(max_keys - 1, 0).bit_length()) // block_n)
    programs, slots = num_rows * heads_per_row, max(num_cores, 1) * per_core
    best, best_cost = 1, float("inf")
    for splits in range(1, min(tiles, MAX_SPLITS) + 1):
        waves = -(-programs * splits // slots)
        cost = waves * (-(-tiles // splits) + _PROGRAM_COST)
        cost += _MERGE_COST + splits // 8 if splits > 1 else 0
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


@triton.jit
def _fold_parts(
    acc: tl.tensor, total: tl.tensor, peak: tl.tensor, partial: tl.tensor, partial_lse: tl.tensor,
    place: tl.tensor, there: tl.tensor, dim: tl.tensor, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    parts: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Take what was found of shared keys, in `parts` parts from place [M] on, into (acc, total, peak)."""
    for part in range(parts):
        lse = tl.load(partial_lse + place + part, mask=there, other=float("-inf"))
        where = (place + part)[:, None] * DIM_PAD + dim[None, :]
        inside = there[:, None] & (dim < HEAD_DIM)[None, :]
        found = tl.load(partial + where, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, lse)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(lse - base)
        acc = acc * shrink[:, None] + found * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["window", "table_row", "all_splits"])
def paged_decode_kernel(
    q: tl.tensor, pool: tl.tensor, out: tl.tensor, partial: tl.tensor, partial_lse: tl.tensor,
    block_tables: tl.tensor, seq_lens: tl.tensor, query_start: tl.tensor, sinks: tl.tensor,
    qk_scale: tl.tensor, cap_scale: tl.tensor, window: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, table_row: tl.tensor,
    row_keys: tl.tensor, all_splits: tl.tensor,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr,
    SHARED: tl.constexpr, EARLY: tl.constexpr, BESIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Rows with exactly one query; the others are left alone.

    q [tokens, heads, dim]; pool: one layer, [blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM]; out
    [tokens, heads, dim] if not SPLIT; else partial [rows, heads, all_splits, DIM_PAD] and
    partial_lse [rows, heads, all_splits] fp32. If SHARED, a row's first row_keys are left to
    shared.py. With SPLIT its splits follow those of the grid, and a row without any marks these as
    empty; else partial and partial_lse hold its splits alone, and this goes on from them. EARLY: kernels may
    begin before those in front of them are done: this one beside shared.py's, the merge beside this one.
    BESIDE: the prompts' kernel in front of this one may be under way still.
    Grid: rows, KV_HEADS * tiles of the group, splits.
    """
    if EARLY and SPLIT:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    row = tl.program_id(0)
    kv_head = tl.program_id(1) // GROUP_TILES
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        if (EARLY and SHARED) or BESIDE:  # so that what comes after this kernel comes after both
            tl.extra.cuda.gdc_wait()
        return
    length = tl.load(seq_lens + row)
    member = (tl.program_id(1) % GROUP_TILES) * GROUP_TILE + tl.arange(0, BLOCK_M)
    valid = (tl.arange(0, BLOCK_M) < GROUP_TILE) & (member < GROUP)
    heads = kv_head * GROUP + member
    dim = tl.arange(0, DIM_PAD)
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    q_row = q + token.to(tl.int64) * q_token
    query = tl.load(q_row + heads[:, None] * q_head + dim[None, :], mask=inside, other=0.0)

    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    if SHARED:
        first = tl.load(row_keys + row)
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_N), num_splits)
    begin = first + split * share * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, length)

    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    position = tl.zeros([BLOCK_M], tl.int32) + (length - 1)
    common = (row * (KV_HEADS * GROUP) + heads).to(tl.int64) * all_splits
    there = valid & (first > 0)
    if SHARED and not SPLIT and not EARLY:
        acc, total, peak = _fold_parts(
            acc, total, peak, partial, partial_lse, common, there, dim, HEAD_DIM, DIM_PAD, all_splits,
        )  # fmt: skip
    keys = pool + kv_head * HEAD_STRIDE
    acc, total, peak = attend_tiles(
        query, acc, total, peak, keys, keys + KV_HEADS * HEAD_STRIDE,
        block_tables + row.to(tl.int64) * table_row, begin, end, position, window,
        qk_scale, cap_scale, HEAD_DIM, DIM_PAD, BLOCK_SIZE, 2 * KV_HEADS * HEAD_STRIDE, BLOCK_N,
        True, HAS_WINDOW, SOFTCAP,
    )  # fmt: skip
    if SHARED and EARLY:
        tl.extra.cuda.gdc_wait()
        if not SPLIT:
            acc, total, peak = _fold_parts(
                acc, total, peak, partial, partial_lse, common, there, dim, HEAD_DIM, DIM_PAD, all_splits,
            )  # fmt: skip
    if SPLIT:
        where = common + split
        if SHARED:
            if (split == 0) & (first == 0):
                for other in range(num_splits, all_splits):
                    empty = tl.full([BLOCK_M], float("-inf"), tl.float32)
                    tl.store(partial_lse + where + other, empty, mask=valid)
        total = tl.where(total == 0.0, 1.0, total)  # no keys: peak is -inf, and so is the sum
        tl.store(partial_lse + where, peak + tl.log2(total), mask=valid)
        tl.store(partial + where[:, None] * DIM_PAD + dim[None, :], acc / total[:, None], inside)
    else:
        result = finish_softmax(acc, total, peak, sinks, heads, valid, SINKS)
        place = out + token.to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM)
        place += heads[:, None] * HEAD_DIM + dim[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside)
    if BESIDE:
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    out: tl.tensor, partial: tl.tensor, partial_lse: tl.tensor, query_start: tl.tensor, sinks: tl.tensor, num_splits: tl.tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
    SINKS: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Weigh the splits of one (row, head) by their log-sum-exp. Grid: rows, HEADS.

    EARLY: the kernel whose splits these are may be under way still.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - token != 1:
        return
    split = tl.arange(0, SPLITS_PAD)
    dim = tl.arange(0, DIM_PAD)
    where = (row * HEADS + head).to(tl.int64) * num_splits + split
    lse = tl.load(partial_lse + where, mask=split < num_splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - peak)
    total = tl.sum(weight, 0)
    if SINKS:
        total += tl.exp2(sink - peak)
    total = tl.where(total == 0.0, 1.0, total)
    # Splits without keys were never written: not read either.
    used = (lse > float("-inf"))[:, None] & (dim < HEAD_DIM)[None, :]
    part = tl.load(partial + where[:, None] * DIM_PAD + dim[None, :], mask=used, other=0.0)
    result = tl.sum(part * weight[:, None], 0) / total
    place = out + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + dim
    tl.store(place, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
