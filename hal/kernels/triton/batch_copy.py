"""The CUDA runtime's copy of many pieces in one call: the copy engines work, the cores stay free.

A kernel that moves blocks over the link holds cores while it waits for the link, and a matrix
product beside it finds them taken. The copy engines don't compute, but one call for each piece costs
the host more than the piece takes; cudaMemcpyBatchAsync (CUDA 12.8) takes them all at once. Torch
doesn't offer it, so it is called where torch has loaded it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["BatchCopy", "batch_copy"]

_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
_FIRST = (12, 8)

BatchCopy = Callable[[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], int], None]
"""(sources, targets, sizes in bytes, a stream that isn't the default one) -> issued."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),  # hints for managed memory: none
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


@cache
def batch_copy() -> BatchCopy | None:
    """None where the runtime has no such call: another vendor's, or an older one."""
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if version < _FIRST:
        return None
    try:
        call = ctypes.CDLL(f"libcudart.so.{version[0]}").cudaMemcpyBatchAsync
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_int
    attributes = _Attributes(order=_IN_STREAM_ORDER)
    used = ctypes.c_size_t(0)  # the attributes' only entry counts from piece 0 on
    failed = ctypes.c_size_t(0)
    # Up to CUDA 12 it says in which piece an error was.
    which = (ctypes.byref(failed),) if version[0] < 13 else ()

    def copy(
        sources: NDArray[np.uint64], targets: NDArray[np.uint64], sizes: NDArray[np.uint64],
        stream: int,
    ) -> None:  # fmt: skip
        arrays = (np.ascontiguousarray(a.reshape(-1), np.uint64) for a in (targets, sources, sizes))
        there, here, size = arrays
        status = call(
            ctypes.c_void_p(there.ctypes.data), ctypes.c_void_p(here.ctypes.data),
            ctypes.c_void_p(size.ctypes.data), ctypes.c_size_t(len(size)),
            ctypes.byref(attributes), ctypes.byref(used), ctypes.c_size_t(1), *which,
            ctypes.c_void_p(stream),
        )  # fmt: skip
        if status:
            raise RuntimeError(f"cudaMemcpyBatchAsync of {len(size)} pieces failed: error {status}")

    return copy
