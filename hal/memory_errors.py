"""Tells whether an error means that memory ran out, whatever library noticed it, and what it said."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory", "one_line"]

# Allocators that raise a plain RuntimeError: torch's on the CPU, cuBLAS' workspaces, ONNX Runtime's.
_WORDS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work may succeed where this failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def one_line(error: BaseException) -> str:
    """An error's text, or its name if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
