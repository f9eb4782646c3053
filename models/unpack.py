"""Weights that checkpoints hold in fewer bits, unpacked to what is computed with."""

from __future__ import annotations

import torch
from torch import Tensor

from halyard.hal.errors import ModelError

__all__ = ["unpack_fp8", "unpack_mxfp4"]

_FP8_BLOCK = 128  # rows and columns that share a factor
# OCP Microscaling Formats 1.0, FP4 E2M1: a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127


def unpack_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[experts, out, groups, 16] and [experts, out, groups], uint8 -> [experts, 32 * groups, out].

    A byte holds two numbers, the first in its lower half; a group's are multiplied by two to the power of
    its scale, less 127. Exact, but for what `dtype` can't hold.

    Raises:
        ModelError: the two don't fit each other.
    """
    if blocks.shape[:-1] != scales.shape:
        raise ModelError(
            f"packed weights have {list(blocks.shape)} and their scales {list(scales.shape)}: "
            "download the checkpoint again"
        )
    experts, out, groups, half = blocks.shape
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], device=blocks.device)
    made = torch.empty(experts, groups * 2 * half, out, dtype=dtype, device=blocks.device)
    # An expert at a time: numbers on their way take eight times a byte's room.
    for block, scale, place in zip(blocks, scales, made, strict=True):
        pairs = torch.stack((block & 15, block >> 4), -1).reshape(out, groups, 2 * half)
        factors = torch.exp2(scale.float() - _E8M0_BIAS)
        place.copy_((values[pairs.int()] * factors[..., None]).reshape(out, -1).T)
    return made


def unpack_fp8(weight: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] float8_e4m3fn and a factor of each block of 128 x 128 -> [out, in].

    Raises:
        ModelError: the two don't fit each other.
    """
    rows, columns = weight.shape
    blocks = (-(-rows // _FP8_BLOCK), -(-columns // _FP8_BLOCK))
    if tuple(factors.shape) != blocks:
        raise ModelError(
            f"a weight of {rows} x {columns} in fp8 needs {blocks[0]} x {blocks[1]} factors, there are "
            f"{list(factors.shape)}: only blocks of {_FP8_BLOCK} x {_FP8_BLOCK} can be read"
        )
    made = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    wide = factors.float().repeat_interleave(_FP8_BLOCK, 1)[:, :columns]
    for number, start in enumerate(range(0, rows, _FP8_BLOCK)):
        some = slice(start, start + _FP8_BLOCK)
        made[some] = weight[some].float() * wide[number]
    return made
