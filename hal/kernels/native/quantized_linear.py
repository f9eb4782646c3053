"""A linear over weights of 8 or 4 bits: quantize_linear once, halyard::quantized_linear often."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from halyard.hal.kernels.native.linear import PANEL, multiply

__all__ = ["GROUPS", "dequantize_linear", "quantize_linear", "quantized_linear"]

GROUPS = {8: 128, 4: 64}  # bits -> inputs that share a scale; mirrors linear.cpp
_CLIPS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # shares of the range that are tried

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define(
    "quantized_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int bits) -> Tensor"
)


def quantize_linear(weight: Tensor, bits: int) -> Tensor:
    """The packed codes and scales of a weight [out, in]; `in` is a multiple of GROUPS[bits].

    Symmetric; a group's scale is the one of a few that leaves the least squared error.

    Returns:
        [panels, in / group, bytes of codes and 64 fp32 scales] uint8.
    """
    num_outputs, num_inputs = weight.shape
    group, panels = GROUPS[bits], -(-num_outputs // PANEL)
    size = group * PANEL * bits // 8
    packed = torch.empty(
        (panels, num_inputs // group, size + 4 * PANEL), dtype=torch.uint8, device=weight.device
    )
    if isinstance(weight, torch._subclasses.FakeTensor):
        return packed
    for panel in range(panels):
        rows = weight[panel * PANEL : (panel + 1) * PANEL].float()
        rows = torch.nn.functional.pad(rows, (0, 0, 0, PANEL - len(rows)))
        codes, scales = _round(rows.view(PANEL, -1, group), bits)
        lines = codes.permute(1, 2, 0)  # [groups, group, 64]
        if bits == 4:
            nibbles = (lines + 8).to(torch.uint8)
            data = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        else:
            data = lines.to(torch.int8).view(torch.uint8)
        packed[panel, :, :size] = data.reshape(-1, size)
        packed[panel, :, size:] = scales.T.contiguous().view(torch.uint8)
    return packed


def _round(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes like `values` [64, groups, group] and scales [64, groups]."""
    top = 2 ** (bits - 1) - 1
    largest = values.abs().amax(-1).clamp_min(1e-30)
    best = torch.full_like(largest, math.inf)
    scales = largest
    for clip in _CLIPS[bits]:
        tried = largest * (clip / top)
        codes = (values / tried[..., None]).round_().clamp_(-top - (bits == 4), top)
        error = (codes * tried[..., None] - values).square_().sum(-1)
        scales = torch.where(error < best, tried, scales)
        best = torch.minimum(error, best)
    return (values / scales[..., None]).round_().clamp_(-top - (bits == 4), top), scales


def dequantize_linear(packed: Tensor, out_features: int, bits: int) -> Tensor:
    """What the packed form stands for: [out, in] fp32."""
    group = GROUPS[bits]
    size = group * PANEL * bits // 8
    panels, groups, _ = packed.shape
    data = packed[..., :size].reshape(panels, groups, -1, PANEL)
    if bits == 4:
        both = torch.stack((data & 15, data >> 4), 3).reshape(panels, groups, group, PANEL)
        codes = both.float() - 8
    else:
        codes = data.contiguous().view(torch.int8).float()
    scales = packed[..., size:].contiguous().view(torch.float32)  # [panels, groups, 64]
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
