"""Prefill, chunked prefill and mixed batches: tiles of query tokens times the heads of a group.

Rows may have any number of queries. The grid has at most one idle tile a row and follows from the
number of tokens and rows; each program finds its row by bisecting query_start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halyard.hal.kernels.triton.online import attend_tiles, finish_softmax

__all__ = ["paged_prefill_kernel"]


@triton.jit(do_not_specialize=["window", "table_row", "num_rows"])
def paged_prefill_kernel(
    q: tl.tensor, pool: tl.tensor, out: tl.tensor, block_tables: tl.tensor, seq_lens: tl.tensor, query_start: tl.tensor, sinks: tl.tensor,
    qk_scale: tl.tensor, cap_scale: tl.tensor, window: tl.tensor, num_rows: tl.tensor,
    q_token: tl.tensor, q_head: tl.tensor, table_row: tl.tensor,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    SKIP_SINGLE: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """q, out [tokens, heads, dim]; pool: one layer, [blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM].

    Row m of a tile is query m // GROUP_TILE of it and head m % GROUP_TILE of the group.
    SKIP_SINGLE leaves rows with one query to the decode kernel, which with EARLY may begin beside this one.
    Grid: tokens // TOKENS + rows, KV_HEADS * tiles of the group.
    """
    if EARLY and SKIP_SINGLE:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    TOKENS: tl.constexpr = BLOCK_M // GROUP_TILE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see the most keys: first
    row = num_rows * 0  # a tensor, also where the loop has nothing to do
    after = num_rows
    while after - row > 1:
        middle = (row + after) // 2
        begins = tl.load(query_start + middle) // TOKENS + middle
        row = tl.where(begins <= tile, middle, row)
        after = tl.where(begins <= tile, after, middle)
    row_start = tl.load(query_start + row)
    num_queries = tl.load(query_start + row + 1) - row_start
    first_query = (tile - (row_start // TOKENS + row)) * TOKENS
    if first_query >= num_queries:
        return
    if SKIP_SINGLE:
        if num_queries == 1:
            return
    length = tl.load(seq_lens + row)
    kv_head = tl.program_id(1) // GROUP_TILES
    lane = tl.arange(0, BLOCK_M)
    member = (tl.program_id(1) % GROUP_TILES) * GROUP_TILE + lane % GROUP_TILE
    query = first_query + lane // GROUP_TILE
    valid = (lane < TOKENS * GROUP_TILE) & (query < num_queries) & (member < GROUP)
    heads = kv_head * GROUP + member
    dim = tl.arange(0, DIM_PAD)
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    token = (row_start + query).to(tl.int64)
    q_place = q + (token * q_token + heads * q_head)[:, None] + dim[None, :]
    q_tile = tl.load(q_place, mask=inside, other=0.0)

    position = length - num_queries + query
    first_position = length - num_queries + first_query
    end = length - num_queries + tl.minimum(first_query + TOKENS, num_queries)
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    BLOCK_STRIDE: tl.constexpr = 2 * KV_HEADS * HEAD_STRIDE
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    keys = pool + kv_head * HEAD_STRIDE
    values = keys + KV_HEADS * HEAD_STRIDE
    table = block_tables + row.to(tl.int64) * table_row
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    else:  # tiles that every query sees whole need no mask
        whole = (first_position + 1) // BLOCK_N * BLOCK_N
        acc, total, peak = attend_tiles(
            q_tile, acc, total, peak, keys, values, table, 0, whole, position, window,
            qk_scale, cap_scale, HEAD_DIM, DIM_PAD, BLOCK_SIZE, BLOCK_STRIDE, BLOCK_N,
            False, False, SOFTCAP,
        )  # fmt: skip
        begin = whole
    acc, total, peak = attend_tiles(
        q_tile, acc, total, peak, keys, values, table, begin, end, position, window,
        qk_scale, cap_scale, HEAD_DIM, DIM_PAD, BLOCK_SIZE, BLOCK_STRIDE, BLOCK_N,
        True, HAS_WINDOW, SOFTCAP,
    )  # fmt: skip
    result = finish_softmax(acc, total, peak, sinks, heads, valid, SINKS)
    place = out + (token * (KV_HEADS * GROUP * HEAD_DIM) + heads * HEAD_DIM)[:, None] + dim[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)
