"""A linear over weights packed for the CPU's vectors: pack_linear once, halyard::packed_linear often."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halyard.hal.kernels.native.library import (
    MIN_PARALLEL_WORK,
    best_isa,
    load_library,
    num_threads,
)

__all__ = ["PANEL", "multiply", "pack_linear", "packed_linear", "unpack_linear"]

PANEL = 64  # outputs a panel; mirrors linear.cpp

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor")


class _Args(ctypes.Structure):
    """Mirrors `struct LinearArgs` of operators.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "stride", "threads")),
    )


def pack_linear(weight: Tensor) -> Tensor:
    """The packed form of a weight [out, in], fp32 or bf16 (then `in` must be even).

    Returns:
        [panels, in, 64] fp32, or [panels, in / 2, 64, 2] bf16; outputs are padded with zeros.
    """
    weight = weight.contiguous()
    num_outputs, num_inputs = weight.shape
    panels = -(-num_outputs // PANEL)
    pair = 1 if weight.dtype == torch.float32 else 2
    packed = weight.new_zeros((panels, num_inputs // pair, PANEL, pair))
    full = num_outputs // PANEL
    whole = weight[: full * PANEL].view(full, PANEL, num_inputs // pair, pair)
    packed[:full] = whole.transpose(1, 2)
    if full < panels:
        rest = weight[full * PANEL :].view(-1, num_inputs // pair, pair)
        packed[full, :, : len(rest)] = rest.transpose(0, 1)
    return packed.squeeze(-1) if pair == 1 else packed


def unpack_linear(packed: Tensor, out_features: int) -> Tensor:
    """The inverse of pack_linear: [out, in], contiguous."""
    pairs = packed.unsqueeze(-1) if packed.dim() == 3 else packed
    return pairs.transpose(1, 2).reshape(len(packed) * PANEL, -1)[:out_features]


@cache
def _functions() -> dict[tuple[str, torch.dtype], Any]:
    """The library's products by kind of weight and dtype of input."""
    from halyard.hal.devices.cpu import CpuDevice

    info = CpuDevice.probe().info
    if info is None:
        raise AssertionError("a CPU is always there")
    library = load_library(best_isa(info.features))
    if library.halyard_linear_args_size() != ctypes.sizeof(_Args):
        raise AssertionError("the native library was built from another source")
    return {
        (kind, dtype): getattr(library, f"halyard_{kind}_{str(dtype).removeprefix('torch.')}")
        for kind in ("linear", "quantized")
        for dtype in (torch.float32, torch.bfloat16)
    }


def multiply(
    kind: str, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *more: Any
) -> Tensor:
    """x [..., in] times packed weights, plus bias [out] or None -> [..., out] in x's dtype.

    Args:
        kind: "linear" or "quantized"; more: what the C function of that kind wants besides.
    """
    x = x.contiguous()
    num_inputs = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = math.prod(x.shape[:-1])
    large = rows * num_inputs * out_features >= MIN_PARALLEL_WORK
    args = _Args(
        x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
        rows, num_inputs, out_features, num_inputs, num_threads() if large else 1,
    )  # fmt: skip
    _functions()[kind, x.dtype](ctypes.byref(args), *more)
    return y


@torch.library.impl(_library, "packed_linear", "CPU")
def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return multiply("linear", x, packed, bias, out_features)


@torch.library.register_fake("halyard::packed_linear", lib=_library)
def _packed_linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


packed_linear = torch.ops.halyard.packed_linear.default
"""x [..., in], packed by pack_linear, bias [out] or None -> [..., out] in x's dtype."""
