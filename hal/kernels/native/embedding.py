"""Rows of a packed matrix: lets a tied embedding and lm_head share one packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from halyard.hal.kernels.native.linear import PANEL

__all__ = ["packed_embedding"]

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define("packed_embedding(Tensor ids, Tensor packed, int in_features) -> Tensor")


@torch.library.impl(_library, "packed_embedding", "CPU")
def _packed_embedding(ids: Tensor, packed: Tensor, in_features: int) -> Tensor:
    flat = ids.reshape(-1)
    rows = packed[flat // PANEL, :, flat % PANEL]  # [tokens, in] or [tokens, in / 2, 2]
    return rows.reshape(*ids.shape, in_features)


@torch.library.register_fake("halyard::packed_embedding", lib=_library)
def _packed_embedding_fake(ids: Tensor, packed: Tensor, in_features: int) -> Tensor:
    return packed.new_empty((*ids.shape, in_features))


packed_embedding = torch.ops.halyard.packed_embedding.default
"""ids [...] int64, packed by pack_linear -> [..., in] rows of the matrix that was packed."""
