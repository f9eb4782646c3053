"""Dense attention, written apart from every kernel: in fp64 it is the truth of the suite."""

from __future__ import annotations

import torch
from torch import Tensor

from halyard.hal.types import AttentionLayer

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, dtype: torch.dtype) -> Tensor:
    """The queries are the last tokens of the keys.

    Args:
        q: [queries, heads, dim]; k, v: [length, kv_heads, dim]; on the host.
        dtype: what every step is computed in.
    Returns:
        [queries, heads, dim] in `dtype`.
    """
    group = layer.num_heads // layer.num_kv_heads
    out = torch.empty(q.shape, dtype=dtype)
    offset = k.shape[0] - q.shape[0]
    position = offset + torch.arange(q.shape[0])[:, None]
    key = torch.arange(k.shape[0])[None, :]
    hidden = key > position
    if layer.window:
        hidden |= key <= position - layer.window
    sinks = layer.sinks.cpu() if layer.sinks is not None else None
    for head in range(layer.num_heads):
        keys, values = k[:, head // group].to(dtype), v[:, head // group].to(dtype)
        scores = q[:, head].to(dtype) @ keys.T * layer.scale
        if layer.softcap:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            extra = sinks[head].to(dtype).expand(len(scores), 1)
            weights = torch.softmax(torch.cat([scores, extra], dim=1), dim=1)[:, :-1]
        else:
            weights = torch.softmax(scores, dim=1)
        out[:, head] = weights @ values
    return out
