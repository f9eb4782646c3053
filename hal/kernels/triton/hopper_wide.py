"""Prefill for Hopper with long prompts: several warpgroups, each with queries of its own, read the same keys.

One warpgroup a program (hopper.py) waits for nobody, but each reads all keys from the second-level
cache for its 64 rows alone, and that is what it is bound by: 7 TB/s. Here one warp copies tiles of keys
and values for all warpgroups of a program (hopper_parts.py).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from halyard.hal.kernels.triton.hopper_online import (
    load_layout,
    out_layout,
    row_of_tile,
    score_layout,
)
from halyard.hal.kernels.triton.hopper_parts import (
    attend_keys,
    begin_barriers,
    copy_keys,
    leave_keys,
)

__all__ = ["hopper_wide_kernel"]


@gluon.jit
def _attend(
    q: gl.tensor, out: gl.tensor, q_tiles: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor, v: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    clean: gl.shared_memory_descriptor, tiles: gl.tensor, end: gl.tensor, first_token: gl.tensor,
    left: gl.tensor, first_position: gl.tensor, kv_head: gl.tensor, first_head: gl.tensor,
    qk_scale: gl.tensor, q_token: gl.tensor, q_head: gl.tensor,
    PART: gl.constexpr, GROUP: gl.constexpr, GROUP_TILE: gl.constexpr, KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """A warpgroup, the queries PART * TOKENS .. of the program's `left` ones, if there are any."""
    WARPS: gl.constexpr = gl.num_warps()
    TOKENS: gl.constexpr = BLOCK_M // GROUP_TILE
    LOAD: gl.constexpr = load_layout(BLOCK_N, HEAD_DIM, WARPS)
    SCORE: gl.constexpr = score_layout(BLOCK_N, WARPS)
    OUT: gl.constexpr = out_layout(HEAD_DIM, WARPS)
    if left <= PART * TOKENS:
        leave_keys(k_full, k_empty, v_full, v_empty, tiles, STAGES)
    else:
        member = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LOAD))
        query = PART * TOKENS + member // GROUP_TILE
        head = first_head + member % GROUP_TILE
        valid = (member < TOKENS * GROUP_TILE) & (query < left) & (head < GROUP)
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOAD))
        token = (first_token + query).to(gl.int64)
        place = q + (token * q_token + (kv_head * GROUP + head) * q_head)[:, None] + dim[None, :]
        own = q_tiles.index(PART)
        own.store(gl.load(place, mask=valid[:, None], other=0.0))
        fence_async_shared()
        position = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORE)) // GROUP_TILE
        position = first_position + PART * TOKENS + position
        acc, total, _ = attend_keys(
            own, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end, position,
            first_position + PART * TOKENS, qk_scale, PART, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        result = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
        member = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
        query = PART * TOKENS + member // GROUP_TILE
        head = first_head + member % GROUP_TILE
        valid = (member < TOKENS * GROUP_TILE) & (query < left) & (head < GROUP)
        token = (first_token + query).to(gl.int64)
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUT))
        offset = token * (KV_HEADS * GROUP * HEAD_DIM) + (kv_head * GROUP + head) * HEAD_DIM
        gl.store(
            out + offset[:, None] + dim[None, :], result.to(q.dtype.element_ty), valid[:, None]
        )


@gluon.jit(do_not_specialize=["table_row", "num_rows"])
def hopper_wide_kernel(
    q: gl.tensor, boxes: gl.tensor, out: gl.tensor, block_tables: gl.tensor, seq_lens: gl.tensor,
    query_start: gl.tensor, qk_scale: gl.tensor, num_rows: gl.tensor,
    q_token: gl.tensor, q_head: gl.tensor, table_row: gl.tensor,
    GROUP: gl.constexpr, GROUP_TILE: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr, REGISTERS: gl.constexpr, SKIP_SINGLE: gl.constexpr,
) -> None:  # fmt: skip
    """Arguments and grid as for paged_prefill_kernel, with tiles of PARTS * BLOCK_M // GROUP_TILE tokens.

    boxes: the pool of one layer as a matrix [blocks * 2 * KV_HEADS * BLOCK_SIZE, HEAD_DIM], a tensor
    descriptor with boxes of 16 x 64. Launched with 4 warps, the first part's.

    Args:
        BLOCK_M: rows of a part. PARTS: 2 or 3 warpgroups. REGISTERS: of a thread of each but the first.
        STAGES: tiles of keys, and of values, in shared memory, at least 2.
    """
    if SKIP_SINGLE:  # those rows' kernel may begin beside this one
        gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    GROUP_TILES: gl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    TOKENS: gl.constexpr = PARTS * (BLOCK_M // GROUP_TILE)
    COUNT: gl.constexpr = HEAD_DIM // 64 * BLOCK_N
    DTYPE: gl.constexpr = q.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # the last queries see the most keys: first
    row, row_start, num_queries, first_query = row_of_tile(query_start, num_rows, tile, TOKENS)
    if first_query >= num_queries:
        return
    if SKIP_SINGLE:
        if num_queries == 1:
            return
    before = gl.load(seq_lens + row) - num_queries  # keys in front of the row's first query
    left = gl.minimum(num_queries - first_query, TOKENS)
    end = before + first_query + left
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    kv_head = gl.program_id(1) // GROUP_TILES
    first_head = (gl.program_id(1) % GROUP_TILES) * GROUP_TILE
    table = block_tables + row.to(gl.int64) * table_row
    first_token = row_start + first_query
    first_position = before + first_query

    q_tiles = gl.allocate_shared_memory(DTYPE, [PARTS, BLOCK_M, HEAD_DIM], SHARED)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, COUNT, 64], SHARED)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, COUNT, 64], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    clean = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    begin_barriers(k_full, k_empty, v_full, v_empty, clean, PARTS, STAGES)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 0, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 1, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (copy_keys, (boxes, table, k, v, k_full, k_empty, v_full, v_empty, tiles, end, kv_head,
                              BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCK_N, STAGES)),
            ],
            [WARPS, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 0, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 1, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 2, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (copy_keys, (boxes, table, k, v, k_full, k_empty, v_full, v_empty, tiles, end, kv_head,
                              BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCK_N, STAGES)),
            ],
            [WARPS, WARPS, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
