"""A linear over weights packed for the CPU's vectors: pack_linear once, halyard::packed_linear often."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
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
from halyard.hal.memory_advice import ask_for_huge_pages

__all__ = [
    "PANEL",
    "fill_panels",
    "functions",
    "gated_linear",
    "multiply",
    "pack_linear",
    "packed_linear",
    "unpack_linear",
]

PANEL = 64  # outputs a panel; mirrors linear.cpp

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor")
_library.define("gated_linear(Tensor x, Tensor packed, int out_features, bool gelu) -> Tensor")


class _Args(ctypes.Structure):
    """Mirrors `struct LinearArgs` of operators.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "stride", "threads")),
    )


class _PackArgs(ctypes.Structure):
    """Mirrors `struct PackArgs` of pack.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "packed")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "first", "threads")),
    )


def pack_linear(*weights: Tensor) -> Tensor:
    """The packed form of weights [out, in], joined along outputs; fp32 or bf16 (`in` even).

    Returns:
        [panels, in, 64] fp32, or [panels, in / 2, 64, 2] bf16; outputs are padded with zeros.
    """
    num_inputs, dtype = weights[0].shape[1], weights[0].dtype
    panels = -(-sum(len(weight) for weight in weights) // PANEL)
    single = dtype == torch.float32
    shape = (panels, num_inputs, PANEL) if single else (panels, num_inputs // 2, PANEL, 2)
    packed = weights[0].new_empty(shape)
    fill_panels("pack", weights, packed)
    return packed


def fill_panels(kind: str, weights: Sequence[Tensor], packed: Tensor, *more: Any) -> None:
    """Write weights [out, in], joined along outputs, to `packed` as panels.

    Args:
        kind: "pack" or "quantize"; more: what the C function of that kind wants besides.
    """
    if isinstance(packed, torch._subclasses.FakeTensor):
        return
    if any(len(weight) % PANEL for weight in weights[:-1]):  # a panel would have two of them
        weights = [torch.cat(list(weights))]
    ask_for_huge_pages(packed.data_ptr(), packed.nbytes)
    first = 0
    for weight in weights:
        plain = weight.contiguous()
        args = _PackArgs(plain.data_ptr(), packed.data_ptr(), *plain.shape, first, num_threads())
        functions()[kind, weight.dtype](ctypes.byref(args), *more)
        first += len(weight) // PANEL


def unpack_linear(packed: Tensor, out_features: int) -> Tensor:
    """The inverse of pack_linear: [out, in], contiguous."""
    pairs = packed.unsqueeze(-1) if packed.dim() == 3 else packed
    return pairs.transpose(1, 2).reshape(len(packed) * PANEL, -1)[:out_features]


@cache
def functions() -> dict[tuple[str, torch.dtype], Any]:
    """The library's functions by what they do and the dtype they work in."""
    from halyard.hal.devices.cpu import CpuDevice

    info = CpuDevice.probe().info
    if info is None:
        raise AssertionError("a CPU is always there")
    library = load_library(best_isa(info.features))
    sizes = (library.halyard_linear_args_size(), library.halyard_pack_args_size())
    if sizes != (ctypes.sizeof(_Args), ctypes.sizeof(_PackArgs)):
        raise AssertionError("the native library was built from another source")
    return {
        (kind, dtype): getattr(library, f"halyard_{kind}_{str(dtype).removeprefix('torch.')}")
        for kind in ("linear", "gated", "quantized", "quantized_rows", "pack", "quantize")
        for dtype in (torch.float32, torch.bfloat16)
    }


def multiply(
    kind: str, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *more: Any
) -> Tensor:
    """x [..., in] times packed weights, plus bias [out] or None -> [..., out] in x's dtype.

    Args:
        kind: "linear", "gated" or "quantized"; more: what the C function of that kind wants besides.
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
    functions()[kind, x.dtype](ctypes.byref(args), *more)
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


@torch.library.impl(_library, "gated_linear", "CPU")
def _gated_linear(x: Tensor, packed: Tensor, out_features: int, gelu: bool) -> Tensor:
    if 2 * out_features != len(packed) * PANEL:
        raise ValueError(f"{out_features} gated outputs need {2 * out_features // PANEL} panels")
    return multiply("gated", x, packed, None, out_features, ctypes.c_int64(gelu))


@torch.library.register_fake("halyard::gated_linear", lib=_library)
def _gated_linear_fake(x: Tensor, packed: Tensor, out_features: int, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


gated_linear = torch.ops.halyard.gated_linear.default
"""x [..., in], packed by pack_linear(gate, up), each [out, in] with `out` a multiple of PANEL ->
activation(x gate^T) * (x up^T) [..., out] in x's dtype, from fp32 sums. The activation: silu, or
gelu by tanh."""
