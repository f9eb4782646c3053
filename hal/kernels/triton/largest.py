"""halyard::largest: topk over few columns, in one kernel where the library takes two.

Needs no Triton until a GPU calls it.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["largest", "largest_of_rows", "takes"]

_MOST_COLUMNS = 512
_MOST = 16
_ELEMENTS = 1024  # of a program
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define("largest(Tensor x, int k) -> (Tensor, Tensor)")


def takes(columns: object, k: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is for so many columns; a symbol says nothing of how many there are."""
    few = isinstance(columns, int) and columns <= _MOST_COLUMNS
    return few and k <= _MOST and dtype in _DTYPES


def largest_of_rows(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [rows, columns] on a GPU, its last dim contiguous -> values and places [rows, k]."""
    rows, columns = x.shape
    out, places = x.new_empty((rows, k)), x.new_empty((rows, k), dtype=torch.int64)
    if rows:
        kernels: Any = importlib.import_module("halyard.hal.kernels.triton.largest_kernel")
        padded = 1 << (columns - 1).bit_length()
        each = max(1, _ELEMENTS // padded)
        kernels.largest_kernel[(-(-rows // each),)](
            x, out, places, rows, x.stride(0), COLUMNS=columns, PAD=padded, MOST=k, ROWS=each,
            num_warps=4,
        )  # fmt: skip
        ahead: Any = importlib.import_module("halyard.hal.kernels.triton.ahead")
        if not ahead.launching():
            places.zero_()
    return out, places


@torch.library.impl(_library, "largest", "CPU")
def _largest_cpu(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, places = x.topk(k, dim=-1)
    return values, places


@torch.library.impl(_library, "largest", "CUDA")
def _largest_gpu(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    if not takes(columns, k, x.dtype):
        return _largest_cpu(x, k)
    rows = math.prod(x.shape[:-1])
    out, places = largest_of_rows(x.reshape(rows, columns).contiguous(), k)
    return out.view(*x.shape[:-1], k), places.view(*x.shape[:-1], k)


@torch.library.register_fake("halyard::largest", lib=_library)
def _largest_fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


largest = torch.ops.halyard.largest.default
"""x [..., columns] -> the k largest of each row, in order, and their places (int64), both [..., k]."""
