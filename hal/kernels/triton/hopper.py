"""Prefill for Hopper: paged_prefill_kernel with the loop of hopper_online.py.

For plain layers of 16-bit heads; windows, softcap, sinks and other GPUs have prefill.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from halyard.hal.kernels.triton.hopper_online import (
    attend_tiles,
    load_layout,
    out_layout,
    row_of_tile,
    score_layout,
)

__all__ = ["hopper_prefill_kernel"]


@gluon.jit(do_not_specialize=["table_row", "num_rows"])
def hopper_prefill_kernel(
    q: gl.tensor, pool: gl.tensor, out: gl.tensor, block_tables: gl.tensor, seq_lens: gl.tensor,
    query_start: gl.tensor, qk_scale: gl.tensor, num_rows: gl.tensor,
    q_token: gl.tensor, q_head: gl.tensor, table_row: gl.tensor,
    GROUP: gl.constexpr, GROUP_TILE: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr,
    SKIP_SINGLE: gl.constexpr,
) -> None:  # fmt: skip
    """Arguments, tiles and grid as for paged_prefill_kernel.

    AHEAD: tiles on their way beside the one in use, at least 1.
    """
    if SKIP_SINGLE:  # those rows' kernel may begin beside this one
        gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    GROUP_TILES: gl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    TOKENS: gl.constexpr = BLOCK_M // GROUP_TILE
    HEAD_STRIDE: gl.constexpr = BLOCK_SIZE * HEAD_DIM
    BLOCK_STRIDE: gl.constexpr = 2 * KV_HEADS * HEAD_STRIDE
    LOAD: gl.constexpr = load_layout(BLOCK_N, HEAD_DIM, WARPS)
    SCORE: gl.constexpr = score_layout(BLOCK_N, WARPS)
    OUT: gl.constexpr = out_layout(HEAD_DIM, WARPS)
    DTYPE: gl.constexpr = q.dtype.element_ty

    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # the last queries see the most keys: first
    row, row_start, num_queries, first_query = row_of_tile(query_start, num_rows, tile, TOKENS)
    if first_query >= num_queries:
        return
    if SKIP_SINGLE:
        if num_queries == 1:
            return
    before = gl.load(seq_lens + row) - num_queries  # keys in front of the row's first query
    end = before + gl.minimum(first_query + TOKENS, num_queries)
    kv_head = gl.program_id(1) // GROUP_TILES
    first_head = (gl.program_id(1) % GROUP_TILES) * GROUP_TILE
    table = block_tables + row.to(gl.int64) * table_row
    member = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LOAD))
    query = first_query + member // GROUP_TILE
    head = first_head + member % GROUP_TILE
    valid = (member < TOKENS * GROUP_TILE) & (query < num_queries) & (head < GROUP)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOAD))
    token = (row_start + query).to(gl.int64)
    place = q + (token * q_token + (kv_head * GROUP + head) * q_head)[:, None] + dim[None, :]
    q_tile = gl.load(place, mask=valid[:, None], other=0.0)
    position = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORE)) // GROUP_TILE
    position = before + first_query + position
    keys = pool + kv_head * HEAD_STRIDE
    acc, total, _ = attend_tiles(
        q_tile, keys, table, end, position, before + first_query, qk_scale,
        BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_M, BLOCK_N, AHEAD, DTYPE,
    )  # fmt: skip
    total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    result = acc / total[:, None]
    member = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
    query = first_query + member // GROUP_TILE
    head = first_head + member % GROUP_TILE
    valid = (member < TOKENS * GROUP_TILE) & (query < num_queries) & (head < GROUP)
    token = (row_start + query).to(gl.int64)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUT))
    offset = token * (KV_HEADS * GROUP * HEAD_DIM) + (kv_head * GROUP + head) * HEAD_DIM
    gl.store(out + offset[:, None] + dim[None, :], result.to(DTYPE), mask=valid[:, None])
