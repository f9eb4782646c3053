"""Lets libraries that Inductor makes call our operators as C functions: see bridge.cpp.

Through the dispatcher and Python a call costs some 15 us, as much as the work of a small linear.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native.embedding import packed_embedding
from halyard.hal.kernels.native.library import (
    MIN_PARALLEL_WORK,
    best_isa,
    load_library,
    num_threads,
    take_threads,
)
from halyard.hal.kernels.native.linear import gated_linear, packed_linear
from halyard.hal.kernels.native.quantized_linear import quantized_embedding, quantized_linear

__all__ = ["C_FUNCTIONS", "offer_operators", "take_torch_threads"]

# Operator -> declarations of the function that generated code calls instead.
C_FUNCTIONS = {
    packed_linear: [
        "AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x, AtenTensorHandle packed, "
        "AtenTensorHandle* bias, int64_t out_features, AtenTensorHandle* result)"
    ],
    gated_linear: [
        "AOTITorchError aoti_torch_cpu_gated_linear(AtenTensorHandle x, AtenTensorHandle packed, "
        "int64_t out_features, int32_t gelu, AtenTensorHandle* result)"
    ],
    quantized_linear: [
        "AOTITorchError aoti_torch_cpu_quantized_linear(AtenTensorHandle x, "
        "AtenTensorHandle packed, AtenTensorHandle* bias, int64_t out_features, int64_t bits, "
        "AtenTensorHandle* result)"
    ],
    packed_embedding: [
        "AOTITorchError aoti_torch_cpu_packed_embedding(AtenTensorHandle ids, "
        "AtenTensorHandle packed, int64_t in_features, AtenTensorHandle* result)"
    ],
    quantized_embedding: [
        "AOTITorchError aoti_torch_cpu_quantized_embedding(AtenTensorHandle ids, "
        "AtenTensorHandle packed, int64_t in_features, int64_t bits, int32_t bfloat16, "
        "AtenTensorHandle* result)"
    ],
}
# Mirrors `struct Torch` of bridge.cpp.
_TORCH_FUNCTIONS = ("get_data_ptr", "get_dim", "get_sizes", "get_strides", "get_dtype",
                    "empty_strided")  # fmt: skip


def offer_operators() -> None:
    """Make the C functions visible to libraries that are loaded from now on. Idempotent."""
    _visible_library()


def take_torch_threads() -> None:
    """Before the C functions are first called: they run on torch's threads, see library.take_threads."""
    take_threads()
    _visible_library().halyard_set_threads(
        ctypes.c_int64(num_threads()), ctypes.c_int64(MIN_PARALLEL_WORK)
    )


@cache
def _visible_library() -> ctypes.CDLL:
    info = CpuDevice.probe().info
    if info is None:
        raise AssertionError("a CPU is always there")
    private = load_library(best_isa(info.features))
    library = ctypes.CDLL(private._name, mode=ctypes.RTLD_GLOBAL)
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _name_of_torch()))
    functions = [getattr(torch_cpu, f"aoti_torch_{name}") for name in _TORCH_FUNCTIONS]
    table = (ctypes.c_void_p * len(functions))(
        *(ctypes.cast(function, ctypes.c_void_p) for function in functions)
    )
    if library.halyard_torch_size() != ctypes.sizeof(table):
        raise AssertionError("the native library was built from another source")
    library.halyard_bind_torch(table)
    return library


def _name_of_torch() -> str:
    return "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
