"""Rotary embedding of a step's queries and keys, both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rotate_kernel"]


@triton.jit
def _load_halves(
    source: tl.tensor, first: tl.tensor, head: tl.tensor, inside: tl.tensor, token_stride: tl.tensor,
    head_stride: tl.tensor,
    TOKENS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves of [TOKENS, heads, 2 x HALF] from the token `first` on."""
    token = tl.arange(0, TOKENS)[:, None, None]
    dim = tl.arange(0, HALF_PAD)[None, None, :]
    # One 64-bit product for all: what is left fits in 32 bits.
    place = source + first * token_stride + (token * token_stride + head * head_stride + dim)
    return tl.load(place, mask=inside, other=0.0), tl.load(place + HALF, mask=inside, other=0.0)


@triton.jit
def _store_rotated(
    target: tl.tensor, first: tl.tensor, head: tl.tensor, inside: tl.tensor, x1: tl.tensor,
    x2: tl.tensor, cos1: tl.tensor, cos2: tl.tensor, sin1: tl.tensor, sin2: tl.tensor,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
) -> None:  # fmt: skip
    """x * cos + (-x2, x1) * sin in fp32, rounded once, to target [tokens, HEADS, 2 x HALF]."""
    token = tl.arange(0, TOKENS)[:, None, None]
    dim = tl.arange(0, HALF_PAD)[None, None, :]
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    dtype = target.dtype.element_ty
    place = target + first * (HEADS * 2 * HALF) + ((token * HEADS + head) * (2 * HALF) + dim)
    tl.store(place, (x1 * cos1 - x2 * sin1).to(dtype), mask=inside)
    tl.store(place + HALF, (x2 * cos2 + x1 * sin2).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_kernel(
    q: tl.tensor, k: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_out: tl.tensor, k_out: tl.tensor,
    num_tokens: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, k_token: tl.tensor,
    k_head: tl.tensor, cos_token: tl.tensor, sin_token: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    TOKENS: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
) -> None:  # fmt: skip
    """q [tokens, HEADS, 2 x HALF], k [tokens, KV_HEADS, 2 x HALF], cos, sin [tokens, 2 x HALF].

    All by their strides, the last axis in one piece; q_out and k_out are contiguous. Grid: tiles of
    TOKENS tokens, and of Q_TILE query heads together with K_TILE key heads: the angles are read once.
    """
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)[:, None, None]
    dim = tl.arange(0, HALF_PAD)[None, None, :]
    inside = dim < HALF
    if TOKENS > 1:
        inside = inside & (first + token < num_tokens)
    q_tile = tl.program_id(1) * Q_TILE + tl.arange(0, Q_TILE)[None, :, None]
    k_tile = tl.program_id(1) * K_TILE + tl.arange(0, K_TILE)[None, :, None]
    in_q = inside & (q_tile < HEADS)
    in_k = inside & (k_tile < KV_HEADS)
    # Every load is under way before the first is waited for.
    q1, q2 = _load_halves(q, first, q_tile, in_q, q_token, q_head, TOKENS, HALF, HALF_PAD)
    k1, k2 = _load_halves(k, first, k_tile, in_k, k_token, k_head, TOKENS, HALF, HALF_PAD)
    cos1, cos2 = _load_halves(cos, first, 0, inside, cos_token, 0, TOKENS, HALF, HALF_PAD)
    sin1, sin2 = _load_halves(sin, first, 0, inside, sin_token, 0, TOKENS, HALF, HALF_PAD)
    cos1 = cos1.to(tl.float32)
    cos2 = cos2.to(tl.float32)
    sin1 = sin1.to(tl.float32)
    sin2 = sin2.to(tl.float32)
    _store_rotated(q_out, first, q_tile, in_q, q1, q2, cos1, cos2, sin1, sin2,
                   HEADS, TOKENS, HALF, HALF_PAD)  # fmt: skip
    _store_rotated(k_out, first, k_tile, in_k, k1, k2, cos1, cos2, sin1, sin2,
                   KV_HEADS, TOKENS, HALF, HALF_PAD)  # fmt: skip
