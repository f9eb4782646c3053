"""Operator schemas that a traced model is made of. Importing this module registers them.

They exist for tracing: `paged_attention` marks where the compiler cuts, and never runs itself
(the program calls PagedKernels.attend there).
"""

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "paged_attention"]

NAMESPACE = "halyard"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, int layer, float scale, "
    "int window, float softcap) -> Tensor"
)


@torch.library.register_fake(f"{NAMESPACE}::paged_attention", lib=_library)
def _paged_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    return q.new_empty(q.shape)


paged_attention = torch.ops.halyard.paged_attention.default
"""q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim] -> like q."""
