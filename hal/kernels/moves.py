"""Block moves on pools that are plain tensors: whole blocks, all layers, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from halyard.hal.types import BlockMove, KVPool

__all__ = ["move_blocks"]


def move_blocks(source: KVPool, target: KVPool, moves: Sequence[BlockMove]) -> None:
    """Copy source.data[:, move.source] to target.data[:, move.target] for every move."""
    if not moves:
        return
    pairs = torch.tensor(moves, dtype=torch.int64)
    target.data.index_copy_(1, pairs[:, 1], source.data.index_select(1, pairs[:, 0]))
