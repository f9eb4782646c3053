"""The shared part of decode: keys that several rows have in common are read once for all of them.

One program per (tile of rows, kv head, split of the shared keys). The query heads of the tile's rows
are the rows of one matrix tile. What it finds goes to the same workspace as the splits of the rows'
own keys, and the merge weighs all of them by their log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halyard.hal.kernels.triton.online import attend_tiles

__all__ = ["shared_decode_kernel"]


@triton.jit(do_not_specialize=["table_row", "num_splits", "first_split"])
def shared_decode_kernel(
    q: tl.tensor, pool: tl.tensor, partial: tl.tensor, partial_lse: tl.tensor,
    block_tables: tl.tensor, query_start: tl.tensor, tile_rows: tl.tensor, tile_keys: tl.tensor,
    qk_scale: tl.tensor, cap_scale: tl.tensor, q_token: tl.tensor, q_head: tl.tensor,
    table_row: tl.tensor, num_splits: tl.tensor, first_split: tl.tensor,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """q [tokens, heads, dim]; partial [rows, heads, num_splits, DIM_PAD] and partial_lse [rows,
    heads, num_splits] fp32, written from first_split on; tile_rows [tiles, ROWS] int32, -1 padded;
    tile_keys [tiles] int32, the shared keys, 0 for a tile that is not used. Grid: tiles, KV_HEADS,
    num_splits - first_split. EARLY: the next kernel may begin beside this one.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    keys = tl.load(tile_keys + tile)
    if keys == 0:
        return
    M: tl.constexpr = ROWS * GROUP_PAD
    place = tl.arange(0, M)
    row = tl.load(tile_rows + tile * ROWS + place // GROUP_PAD)
    member = place % GROUP_PAD
    valid = (row >= 0) & (member < GROUP)
    row = tl.where(row >= 0, row, 0)
    head = kv_head * GROUP + member
    token = tl.load(query_start + row)
    dim = tl.arange(0, DIM_PAD)
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    where = token.to(tl.int64) * q_token + head * q_head
    query = tl.load(q + where[:, None] + dim[None, :], mask=inside, other=0.0)

    tiles = tl.cdiv(keys, BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(2))
    begin = split * share * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, keys)
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    acc = tl.zeros([M, DIM_PAD], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    position = tl.zeros([M], tl.int32) + (keys - 1)  # every row comes after all of them
    first = tl.load(tile_rows + tile * ROWS)
    base = pool + kv_head * HEAD_STRIDE
    acc, total, peak = attend_tiles(
        query, acc, total, peak, base, base + KV_HEADS * HEAD_STRIDE,
        block_tables + first.to(tl.int64) * table_row, begin, end, position, 0,
        qk_scale, cap_scale, HEAD_DIM, DIM_PAD, BLOCK_SIZE, 2 * KV_HEADS * HEAD_STRIDE, BLOCK_N,
        True, False, SOFTCAP,
    )  # fmt: skip
    target = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * num_splits + first_split + split
    total = tl.where(total == 0.0, 1.0, total)  # no keys: peak is -inf, and so is the sum
    tl.store(partial_lse + target, peak + tl.log2(total), mask=valid)
    tl.store(partial + target[:, None] * DIM_PAD + dim[None, :], acc / total[:, None], inside)
