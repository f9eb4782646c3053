"""The shared part of decode for Hopper: shared_decode_kernel with the loop of hopper_online.py.

For layers of 16-bit heads without softcap, whose tile of rows fills a warpgroup; others have shared.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from halyard.hal.kernels.triton.hopper_online import (
    attend_tiles,
    load_layout,
    out_layout,
    score_layout,
)

__all__ = ["hopper_shared_kernel"]


@gluon.jit(do_not_specialize=["table_row", "num_splits", "first_split"])
def hopper_shared_kernel(
    q: gl.tensor, pool: gl.tensor, partial: gl.tensor, partial_lse: gl.tensor,
    block_tables: gl.tensor, query_start: gl.tensor, tile_rows: gl.tensor, tile_keys: gl.tensor,
    qk_scale: gl.tensor, q_token: gl.tensor, q_head: gl.tensor, table_row: gl.tensor,
    num_splits: gl.tensor, first_split: gl.tensor,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, ROWS: gl.constexpr, KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr,
) -> None:  # fmt: skip
    """Arguments and grid as for shared_decode_kernel; AHEAD as for hopper_online.attend_tiles."""
    gdc_launch_dependents()  # rows' own keys may begin to be read: those that go on from here wait
    WARPS: gl.constexpr = gl.num_warps()
    HEAD_STRIDE: gl.constexpr = BLOCK_SIZE * HEAD_DIM
    BLOCK_STRIDE: gl.constexpr = 2 * KV_HEADS * HEAD_STRIDE
    BLOCK_M: gl.constexpr = ROWS * GROUP_PAD
    UNIT: gl.constexpr = max(BLOCK_N, BLOCK_SIZE)  # a split begins with a block and with a tile
    LOAD: gl.constexpr = load_layout(BLOCK_N, HEAD_DIM, WARPS)
    SCORE: gl.constexpr = score_layout(BLOCK_N, WARPS)
    OUT: gl.constexpr = out_layout(HEAD_DIM, WARPS)
    tile = gl.program_id(0)
    kv_head = gl.program_id(1)
    split = gl.program_id(2)
    keys = gl.load(tile_keys + tile)
    if keys == 0:
        return
    share = (keys + UNIT * gl.num_programs(2) - 1) // (UNIT * gl.num_programs(2)) * UNIT
    begin = split * share
    end = gl.minimum(keys - begin, share)

    place = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
    row = gl.load(tile_rows + tile * ROWS + place // GROUP_PAD)
    member = place % GROUP_PAD
    valid = (row >= 0) & (member < GROUP)
    row = gl.maximum(row, 0)
    target = (row.to(gl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + member) * num_splits
    target += first_split + split
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUT))
    parts = partial + target[:, None] * HEAD_DIM + column[None, :]
    if end <= 0:
        empty = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, OUT))
        gl.store(partial_lse + target, empty, mask=valid)
        gl.store(parts, gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, OUT), mask=valid[:, None])
        return

    place = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LOAD))
    row = gl.load(tile_rows + tile * ROWS + place // GROUP_PAD)
    member = place % GROUP_PAD
    there = (row >= 0) & (member < GROUP)
    token = gl.load(query_start + gl.maximum(row, 0)).to(gl.int64)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOAD))
    where = token * q_token + (kv_head * GROUP + member) * q_head
    query = gl.load(q + where[:, None] + dim[None, :], mask=there[:, None], other=0.0)

    # Every row comes after all of these keys.
    position = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORE)) * 0 + (end - 1)
    first = gl.load(tile_rows + tile * ROWS)
    table = block_tables + first.to(gl.int64) * table_row + begin // BLOCK_SIZE
    acc, total, peak = attend_tiles(
        query, pool + kv_head * HEAD_STRIDE, table, end, position, end - 1, qk_scale,
        BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_M, BLOCK_N, AHEAD, q.dtype.element_ty,
    )  # fmt: skip
    lse = gl.convert_layout(peak + gl.log2(total), gl.SliceLayout(1, OUT))
    total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    gl.store(partial_lse + target, lse, mask=valid)
    gl.store(parts, acc / total[:, None], mask=valid[:, None])
