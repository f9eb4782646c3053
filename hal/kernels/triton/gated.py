"""halyard::gated_product: a feed-forward layer's first product and its gate, by whatever is quickest.

Which way is decided when it runs, from shapes alone, as for skinny_linear. Needs no Triton until a
GPU calls it.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from halyard.hal import fallbacks
from halyard.hal.kernels.triton.skinny import skinny_linear
from halyard.hal.kernels.triton.tiles import family

__all__ = ["boxes", "gate", "gated_on_hopper", "gated_product", "takes_hopper"]

_GATE_BLOCK = 1024

# Of the kernel for Hopper: a tile of 128 rows by 128 + 128 columns keeps the matrix units busy out of
# four stages of shared memory; 16 tiles of rows at once read the weights of few columns.
BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M = 128, 128, 64, 4, 16
WARPS, REGISTERS = 8, 168  # of a thread on average: the copying warps give theirs away
# Tiles a multiprocessor, and how many of the multiprocessors the last turn may leave idle: else the
# library shares the work out better (1B and 8B, 128 to 8448 rows, benchmarks/gpu_wide_linears.py).
_LEAST_TURNS = 4
_MOST_IDLE = 0.05  # of all turns

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define("gated_product(Tensor x, Tensor weight, bool gelu) -> Tensor")


def takes_hopper(rows: int, inputs: int, outputs: int, item_size: int, cores: int) -> bool:
    """Whether the kernel for Hopper takes a product of `rows` by 2 x `outputs`, and gains by it."""
    if item_size != 2 or outputs % BLOCK_N or inputs % 8:
        return False
    tiles = -(-rows // BLOCK_M) * (outputs // BLOCK_N)
    turns = -(-tiles // cores)
    return turns >= _LEAST_TURNS and tiles >= (1 - _MOST_IDLE) * turns * cores


def gate(y: Tensor, gelu: bool) -> Tensor:
    """act(first half) * second half of y [rows, 2 x outputs], contiguous, on a GPU -> [rows, outputs]."""
    rows, outputs = y.shape[0], y.shape[1] // 2
    out = y.new_empty((rows, outputs))
    if rows:
        kernels: Any = importlib.import_module("halyard.hal.kernels.triton.gate")
        kernels.gate_kernel[(rows, -(-outputs // _GATE_BLOCK))](
            y, out, outputs, BLOCK=_GATE_BLOCK, GELU=gelu, num_warps=4
        )
    return out


def gated_on_hopper(x: Tensor, weight: Tensor, gelu: bool, cores: int) -> Tensor:
    """x [rows, inputs], weight [2 x outputs, inputs], contiguous, 16 bits -> [rows, outputs]."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2
    out = x.new_empty((rows, outputs))
    tiles = -(-rows // BLOCK_M) * (outputs // BLOCK_N)
    kernels: Any = importlib.import_module("halyard.hal.kernels.triton.hopper_linear")
    kernels.gated_product_kernel[(min(cores, tiles),)](
        boxes(x, BLOCK_M, BLOCK_K), boxes(weight, BLOCK_N, BLOCK_K), boxes(out, BLOCK_M, BLOCK_N),
        rows, inputs, outputs, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, STAGES=STAGES,
        GROUP_M=GROUP_M, GELU=gelu, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    return out


def boxes(matrix: Tensor, rows: int, columns: int) -> Any:
    """A matrix, to be copied in boxes of rows x columns."""
    make, layout = _descriptors()
    return make(matrix, matrix.shape, matrix.stride(), [rows, columns], layout)


@cache
def _descriptors() -> tuple[Any, Any]:
    language: Any = importlib.import_module("triton.experimental.gluon.language")
    nvidia: Any = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    return nvidia.TensorDescriptor, language.NVMMASharedLayout(128, 16, 2)


@cache
def _cores(device: torch.device) -> int:
    """Multiprocessors of a Hopper that the kernel runs on; 0: another GPU, or Triton lacks its parts."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip or family(f"sm_{properties.major}{properties.minor}") != "sm_90":
        return 0
    try:
        importlib.import_module("halyard.hal.kernels.triton.hopper_linear")
        _descriptors()
    except ImportError as error:
        fallbacks.note("gated_product", f"the library multiplies, a second kernel gates: {error}")
        return 0
    return int(properties.multi_processor_count)


@torch.library.impl(_library, "gated_product", "CPU")
def _gated_product_cpu(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    first, second = torch.nn.functional.linear(x, weight).chunk(2, -1)
    if gelu:
        return torch.nn.functional.gelu(first, approximate="tanh") * second
    return torch.nn.functional.silu(first) * second


@torch.library.impl(_library, "gated_product", "CUDA")
def _gated_product_gpu(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    inputs, outputs, rows = x.shape[-1], weight.shape[0] // 2, math.prod(x.shape[:-1])
    cores = _cores(x.device)
    if cores and takes_hopper(rows, inputs, outputs, x.element_size(), cores):
        flat = x.reshape(rows, inputs).contiguous()
        if weight.is_contiguous() and not (flat.data_ptr() | weight.data_ptr()) % 16:
            return gated_on_hopper(flat, weight, gelu, cores).view(*x.shape[:-1], outputs)
    product = skinny_linear(x, weight, None).reshape(rows, 2 * outputs)
    return gate(product, gelu).view(*x.shape[:-1], outputs)


@torch.library.register_fake("halyard::gated_product", lib=_library)
def _gated_product_fake(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


gated_product = torch.ops.halyard.gated_product.default
"""x [..., in], weight [2 x out, in], gate above up -> act(x gate^T) * (x up^T) [..., out], x's dtype.

act: silu, or gelu by tanh. Sums are fp32; whether the halves are rounded before the gate is left open.
"""
