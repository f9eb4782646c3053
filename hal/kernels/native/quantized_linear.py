"""A linear over weights of 8 or 4 bits: quantize_linear once, halyard::quantized_linear often.

A matrix that is looked up too (a tied embedding) is held once: halyard::quantized_embedding widens the
rows it is asked for.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from halyard.hal.kernels.native.linear import PANEL, fill_panels, functions, multiply

__all__ = [
    "GROUP",
    "dequantize_linear",
    "quantize_linear",
    "quantized_embedding",
    "quantized_linear",
]

GROUP = 64  # inputs that share a scale; mirrors quantized.h

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define(
    "quantized_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int bits) -> Tensor"
)
_library.define(
    "quantized_embedding(Tensor ids, Tensor packed, int in_features, int bits, bool bfloat16) "
    "-> Tensor"
)


def quantize_linear(*weights: Tensor, bits: int) -> Tensor:
    """Codes and scales of weights [out, in], joined along outputs; `in` is a multiple of GROUP.

    Symmetric; a group's scale is the one of a few that leaves the least squared error.

    Returns:
        [panels, in / group, bytes of codes and 64 bf16 scales] uint8: see quantized.h.
    """
    panels = -(-sum(len(weight) for weight in weights) // PANEL)
    size = GROUP * PANEL * bits // 8 + 2 * PANEL
    packed = weights[0].new_empty((panels, weights[0].shape[1] // GROUP, size), dtype=torch.uint8)
    fill_panels("quantize", weights, packed, ctypes.c_int64(bits))
    return packed


def _codes(data: Tensor) -> Tensor:
    """Of four bits: [panels, groups, bytes] -> [panels, groups, group, 64]."""
    panels, groups, _ = data.shape
    bytes_ = data.view(panels, groups, -1, 16, 2, 2).permute(0, 1, 2, 4, 5, 3)
    both = torch.stack((bytes_ & 15, bytes_ >> 4), 5)  # [.., pair, input, byte, nibble, lane]
    return both.reshape(panels, groups, -1, PANEL).int() - 8


def dequantize_linear(packed: Tensor, out_features: int, bits: int) -> Tensor:
    """What the packed form stands for: [out, in] fp32."""
    group = GROUP
    size = group * PANEL * bits // 8
    panels, groups, _ = packed.shape
    data = packed[..., :size].contiguous()
    if bits == 4:
        codes = _codes(data).float()
    else:
        codes = data.view(torch.int8).view(panels, groups, group, PANEL).float()
    scales = packed[..., size:].contiguous().view(torch.bfloat16).float()  # [panels, groups, 64]
    whole = (codes * scales[:, :, None]).permute(0, 3, 1, 2)
    return whole.reshape(panels * PANEL, groups * group)[:out_features]


@torch.library.impl(_library, "quantized_linear", "CPU")
def _quantized_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, bits: int
) -> Tensor:
    return multiply("quantized", x, packed, bias, out_features, ctypes.c_int64(bits))


@torch.library.register_fake("halyard::quantized_linear", lib=_library)
def _quantized_linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, bits: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


quantized_linear = torch.ops.halyard.quantized_linear.default
"""x [..., in] fp32 or bf16, packed by quantize_linear, bias [out] or None -> [..., out] as x."""


@torch.library.impl(_library, "quantized_embedding", "CPU")
def _quantized_embedding(
    ids: Tensor, packed: Tensor, in_features: int, bits: int, bfloat16: bool
) -> Tensor:
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    ids = ids.contiguous()
    rows = torch.empty((*ids.shape, in_features), dtype=dtype)
    functions()["quantized_rows", dtype](
        ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(ids.numel()),
        ctypes.c_void_p(packed.data_ptr()), ctypes.c_int64(in_features), ctypes.c_int64(bits),
        ctypes.c_void_p(rows.data_ptr()),
    )  # fmt: skip
    return rows


@torch.library.register_fake("halyard::quantized_embedding", lib=_library)
def _quantized_embedding_fake(
    ids: Tensor, packed: Tensor, in_features: int, bits: int, bfloat16: bool
) -> Tensor:
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    return packed.new_empty((*ids.shape, in_features), dtype=dtype)


quantized_embedding = torch.ops.halyard.quantized_embedding.default
"""ids [...] int64, packed by quantize_linear -> [..., in] rows of the matrix, bf16 or fp32."""
