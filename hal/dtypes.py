"""Names of dtypes (what configs and types hold) and torch's own."""

import torch

from halyard.hal.types import DType

__all__ = ["dtype_name", "torch_dtype"]

_TORCH: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name. Raises KeyError for one that Halyard doesn't know."""
    return _TORCH[name]


def dtype_name(dtype: torch.dtype) -> DType:
    """The name of a torch dtype. Raises KeyError for one that Halyard doesn't know."""
    return _NAMES[dtype]
