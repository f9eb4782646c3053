"""halyard::rotate_pair: the rotary embedding of queries and keys, in one launch on a GPU.

Needs no Triton until a GPU calls it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RotaryTile", "rotary_tile", "rotate", "rotate_pair"]

# Elements of a half of the queries' heads: what a thread takes (loads of 16 bytes), and a program at most.
_PER_THREAD = 16
_AT_MOST = 4096

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define("rotate_pair(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")


@dataclass(frozen=True, slots=True)
class RotaryTile:
    """What a program takes: tokens, and one of `splits` parts of the heads of q and of those of k."""

    tokens: int
    splits: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, heads / {self.splits}, {self.num_warps} warps"

    def constants(self, heads: int, kv_heads: int, dim: int) -> dict[str, int]:
        """The kernel's."""
        return {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HALF": dim // 2,
            "HALF_PAD": _power(dim // 2),
            "TOKENS": self.tokens,
            "Q_TILE": _power(-(-heads // self.splits)),
            "K_TILE": _power(-(-kv_heads // self.splits)),
        }


def rotary_tile(heads: int, kv_heads: int, dim: int) -> RotaryTile:
    """By the model's shape alone: however many tokens, it is one kernel."""
    half, splits = _power(dim // 2), 1
    while splits < heads and _power(-(-heads // splits)) * half > _AT_MOST:
        splits *= 2
    num_warps = max(1, _power(-(-heads // splits)) * half // (32 * _PER_THREAD))
    # With fewer threads Triton loads the angles once and hands them round behind barriers.
    while 32 * num_warps <= half:
        num_warps *= 2
    return RotaryTile(1, splits, num_warps)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, tile: RotaryTile | None = None
) -> tuple[Tensor, Tensor]:
    """`rotate_pair` by the kernel; with another tile than the shape's, to try it."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if tokens:
        q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
        tile = rotary_tile(heads, kv_heads, dim) if tile is None else tile
        kernels: Any = importlib.import_module("halyard.hal.kernels.triton.rotary_kernel")
        kernels.rotate_kernel[(-(-tokens // tile.tokens), tile.splits)](
            q, k, cos, sin, q_out, k_out, tokens, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            cos.stride(0), sin.stride(0), num_warps=tile.num_warps,
            **tile.constants(heads, kv_heads, dim),
        )  # fmt: skip
    return q_out, k_out


@torch.library.impl(_library, "rotate_pair", "CUDA")
def _rotate_pair_gpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, sin)


@torch.library.impl(_library, "rotate_pair", "CPU")
def _rotate_pair_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos1, cos2 = cos.float().unsqueeze(1).chunk(2, -1)
    sin1, sin2 = sin.float().unsqueeze(1).chunk(2, -1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        halves = (first * cos1 - second * sin1, second * cos2 + first * sin2)
        return torch.cat(halves, -1).to(x.dtype)

    return rotated(q), rotated(k)


@torch.library.register_fake("halyard::rotate_pair", lib=_library)
def _rotate_pair_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


rotate_pair = torch.ops.halyard.rotate_pair.default
"""q [tokens, heads, dim], k [tokens, kv_heads, dim], cos and sin [tokens, dim] -> q and k, rotated.

x * cos + (-second half, first half) * sin, in fp32 and rounded once to x's dtype, contiguous. What
comes in may lie anywhere (parts of one product) as long as the last axis is in one piece.
"""
