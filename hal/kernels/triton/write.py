"""New keys and values to their slots, both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["kv_write_kernel"]


@triton.jit
def kv_write_kernel(
    k: tl.tensor, v: tl.tensor, pool: tl.tensor, slot_mapping: tl.tensor,
    k_token: tl.tensor, k_head: tl.tensor, v_token: tl.tensor, v_head: tl.tensor,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS_TILE: tl.constexpr,
) -> None:  # fmt: skip
    """k, v [tokens, KV_HEADS, HEAD_DIM] by their strides; slot -1: nothing is written.

    pool: one layer, [blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM]. Grid: tokens, tiles of heads.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)
    dim = tl.arange(0, DIM_PAD)
    inside = (head < KV_HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    new_k = tl.load(k + token * k_token + head[:, None] * k_head + dim[None, :], mask=inside)
    new_v = tl.load(v + token * v_token + head[:, None] * v_head + dim[None, :], mask=inside)
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    place = pool + (slot // BLOCK_SIZE) * (2 * KV_HEADS * HEAD_STRIDE)
    place += (slot % BLOCK_SIZE) * HEAD_DIM
    offset = head[:, None] * HEAD_STRIDE + dim[None, :]
    tl.store(place + offset, new_k.to(pool.dtype.element_ty), mask=inside)
    tl.store(place + KV_HEADS * HEAD_STRIDE + offset, new_v.to(pool.dtype.element_ty), mask=inside)
