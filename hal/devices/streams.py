"""The stream that torch issues work on, for libraries that must issue theirs on the same one."""

from __future__ import annotations

import torch

__all__ = ["current_stream_handle"]


def current_stream_handle(device: torch.device) -> int:
    """The address of torch's current stream on a CUDA or ROCm device, 0 for its default stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)
