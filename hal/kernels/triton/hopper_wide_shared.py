"""The shared part of decode for Hopper: hopper_shared.py's work, by two warpgroups that read the same keys.

A lone warpgroup reads all shared keys from the second-level cache for its 64 query rows, and that
bounds it (hopper_wide.py). Here a pair of tiles of rows, or both halves of a tile of large groups, has
what one warp copies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from halyard.hal.kernels.triton.hopper_online import load_layout, out_layout, score_layout
from halyard.hal.kernels.triton.hopper_parts import (
    attend_keys,
    begin_barriers,
    copy_keys,
    leave_keys,
)

__all__ = ["hopper_wide_shared_kernel"]


@gluon.jit
def _attend(
    q: gl.tensor, partial: gl.tensor, partial_lse: gl.tensor, query_start: gl.tensor,
    members: gl.tensor, target: gl.tensor, q_tiles: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor, v: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    clean: gl.shared_memory_descriptor, tiles: gl.tensor, end: gl.tensor, first_head: gl.tensor,
    num_splits: gl.tensor, qk_scale: gl.tensor, q_token: gl.tensor, q_head: gl.tensor,
    PART: gl.constexpr, GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """A warpgroup, the rows members[PART * BLOCK_M // GROUP_PAD] .., if there are any; target: the split."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = BLOCK_M // GROUP_PAD
    LOAD: gl.constexpr = load_layout(BLOCK_N, HEAD_DIM, WARPS)
    SCORE: gl.constexpr = score_layout(BLOCK_N, WARPS)
    OUT: gl.constexpr = out_layout(HEAD_DIM, WARPS)
    members += PART * ROWS
    if gl.load(members) < 0:  # a tile's rows are its first
        leave_keys(k_full, k_empty, v_full, v_empty, tiles, STAGES)
    else:
        place = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LOAD))
        row = gl.load(members + place // GROUP_PAD)
        there = (row >= 0) & (place % GROUP_PAD < GROUP)
        token = gl.load(query_start + gl.maximum(row, 0)).to(gl.int64)
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOAD))
        where = token * q_token + (first_head + place % GROUP_PAD) * q_head
        own = q_tiles.index(PART)
        own.store(gl.load(q + where[:, None] + dim[None, :], mask=there[:, None], other=0.0))
        fence_async_shared()
        # Every row comes after all of these keys.
        position = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORE)) * 0 + (end - 1)
        acc, total, peak = attend_keys(
            own, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end, position, end - 1,
            qk_scale, PART, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
        lse = gl.convert_layout(peak + gl.log2(total), gl.SliceLayout(1, OUT))
        total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
        place = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
        row = gl.load(members + place // GROUP_PAD)
        there = (row >= 0) & (place % GROUP_PAD < GROUP)
        head = row.to(gl.int64) * HEADS + first_head + place % GROUP_PAD
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUT))
        gl.store(partial_lse + head * num_splits + target, lse, mask=there)
        where = (head * num_splits + target)[:, None] * HEAD_DIM + dim[None, :]
        gl.store(partial + where, acc / total[:, None], mask=there[:, None])


@gluon.jit
def _leave_empty(
    partial: gl.tensor, partial_lse: gl.tensor, members: gl.tensor, target: gl.tensor,
    first_head: gl.tensor, num_splits: gl.tensor,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    COUNT: gl.constexpr,
) -> None:  # fmt: skip
    """A split without keys, which weighs nothing."""
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 4], [32 * 4 // HEAD_DIM, HEAD_DIM // 4], [gl.num_warps(), 1], [1, 0]
    )
    place = gl.arange(0, COUNT, gl.SliceLayout(1, LAYOUT))
    row = gl.load(members + place // GROUP_PAD)
    there = (row >= 0) & (place % GROUP_PAD < GROUP)
    head = row.to(gl.int64) * HEADS + first_head + place % GROUP_PAD
    empty = gl.full([COUNT], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    gl.store(partial_lse + head * num_splits + target, empty, mask=there)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    where = (head * num_splits + target)[:, None] * HEAD_DIM + dim[None, :]
    gl.store(partial + where, gl.zeros([COUNT, HEAD_DIM], gl.float32, LAYOUT), mask=there[:, None])


@gluon.jit(do_not_specialize=["table_row", "num_splits", "first_split"])
def hopper_wide_shared_kernel(
    q: gl.tensor, boxes: gl.tensor, partial: gl.tensor, partial_lse: gl.tensor,
    block_tables: gl.tensor, query_start: gl.tensor, tile_rows: gl.tensor, tile_keys: gl.tensor,
    qk_scale: gl.tensor, q_token: gl.tensor, q_head: gl.tensor, table_row: gl.tensor,
    num_splits: gl.tensor, first_split: gl.tensor,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, ROWS: gl.constexpr, KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
) -> None:  # fmt: skip
    """Arguments as for shared_decode_kernel, boxes as for hopper_wide_kernel.

    Grid: tiles of 2 * BLOCK_M // GROUP_PAD rows, KV_HEADS, splits of the shared keys. Launched with 4
    warps, the first part's.
    """
    gdc_launch_dependents()  # rows' own keys may begin to be read: those that go on from here wait
    WARPS: gl.constexpr = gl.num_warps()
    HEADS: gl.constexpr = KV_HEADS * GROUP
    PARTS: gl.constexpr = 2
    COUNT: gl.constexpr = HEAD_DIM // 64 * BLOCK_N
    UNIT: gl.constexpr = max(BLOCK_N, BLOCK_SIZE)  # a split begins with a block and with a tile
    DTYPE: gl.constexpr = q.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    first = gl.program_id(0) * (PARTS * BLOCK_M // GROUP_PAD)
    kv_head = gl.program_id(1)
    split = gl.program_id(2)
    members = tile_rows + first
    keys = gl.load(tile_keys + first // ROWS)  # of a pair the first is used if any is
    if keys == 0:
        return
    share = (keys + UNIT * gl.num_programs(2) - 1) // (UNIT * gl.num_programs(2)) * UNIT
    begin = split * share
    end = gl.minimum(keys - begin, share)
    first_head = kv_head * GROUP
    target = first_split + split
    if end <= 0:
        _leave_empty(
            partial, partial_lse, members, target, first_head, num_splits,
            GROUP, GROUP_PAD, HEADS, HEAD_DIM, PARTS * BLOCK_M,
        )  # fmt: skip
        return
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    table = block_tables + gl.load(members).to(gl.int64) * table_row + begin // BLOCK_SIZE

    q_tiles = gl.allocate_shared_memory(DTYPE, [PARTS, BLOCK_M, HEAD_DIM], SHARED)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, COUNT, 64], SHARED)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, COUNT, 64], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    clean = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    begin_barriers(k_full, k_empty, v_full, v_empty, clean, PARTS, STAGES)
    gl.warp_specialize(
        [
            (_attend, (q, partial, partial_lse, query_start, members, target, q_tiles, k, v, k_full,
                       k_empty, v_full, v_empty, clean, tiles, end, first_head, num_splits, qk_scale,
                       q_token, q_head, 0, GROUP, GROUP_PAD, HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
            (_attend, (q, partial, partial_lse, query_start, members, target, q_tiles, k, v, k_full,
                       k_empty, v_full, v_empty, clean, tiles, end, first_head, num_splits, qk_scale,
                       q_token, q_head, 1, GROUP, GROUP_PAD, HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
            (copy_keys, (boxes, table, k, v, k_full, k_empty, v_full, v_empty, tiles, end, kv_head,
                         BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCK_N, STAGES)),
        ],
        [WARPS, 1],
        [REGISTERS, 24],
    )  # fmt: skip
