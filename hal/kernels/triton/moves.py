"""Whole blocks from one pool to another: a gather in one launch, over the link too.

The kernel reads and writes pinned host memory in place. All of it runs on the current stream: who
wants moves beside a step chooses another (CopyingDevice).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from halyard.hal.types import BlockMove, KVPool

__all__ = [
    "CHUNK_WORDS",
    "gather_moves",
    "index_moves",
    "launch_moves",
    "move_blocks_kernel",
    "pairs_of",
    "words_of",
]

CHUNK_WORDS = 1024  # 8-byte words a program moves: 8 KiB, 64 B in flight a thread


@triton.jit
def move_blocks_kernel(
    source: tl.tensor, target: tl.tensor, pairs: tl.tensor,
    source_layer: tl.tensor, source_block: tl.tensor, target_layer: tl.tensor, target_block: tl.tensor,
    WORDS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """source, target [layers, blocks, WORDS] int64; pairs [moves, 2] int64.

    Grid: pieces of a block, layers, moves: programs that run together touch few pages, which counts
    where the pages are the host's. *_layer, *_block: words between layers and blocks.
    """
    move = tl.program_id(2).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = word < WORDS
    here = source + layer * source_layer + tl.load(pairs + 2 * move) * source_block
    there = target + layer * target_layer + tl.load(pairs + 2 * move + 1) * target_block
    tl.store(there + word, tl.load(here + word, mask=inside), mask=inside)


def pairs_of(moves: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """[moves, 2]. Several times as quick as a tensor of tuples: the link waits for it."""
    return np.fromiter(chain.from_iterable(moves), np.int64, 2 * len(moves)).reshape(-1, 2)


def words_of(data: Tensor) -> Tensor:
    """[layers, blocks, words] of 8 bytes: moves copy bits, NaN payloads included."""
    return data.flatten(2).view(torch.int64)


def gather_moves(
    source: KVPool, target: KVPool, moves: Sequence[BlockMove], device: torch.device
) -> None:
    """One launch for all moves; host pools must be pinned."""
    if moves:
        pairs = torch.from_numpy(pairs_of(moves)).to(device, non_blocking=True)
        launch_moves(words_of(source.data), words_of(target.data), pairs)


def launch_moves(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """source, target [layers, blocks, words] int64, the words of a block side by side.

    pairs [moves, 2] int64 on the device: block of the source, block of the target.
    """
    layers, _, words = source.shape
    chunk = min(CHUNK_WORDS, triton.next_power_of_2(words))
    grid_moves = 65535  # the most that a grid's last side may have
    for first in range(0, len(pairs), grid_moves):
        some = pairs[first : first + grid_moves]
        move_blocks_kernel[(triton.cdiv(words, chunk), layers, len(some))](
            source, target, some,
            source.stride(0), source.stride(1), target.stride(0), target.stride(1),
            WORDS=words, CHUNK=chunk, num_warps=4,
        )  # fmt: skip


def index_moves(source: KVPool, target: KVPool, moves: Sequence[BlockMove]) -> None:
    """By way of a new tensor: for host memory that neither kernels nor copy engines reach."""
    here, there = source.data, target.data
    pairs = torch.from_numpy(pairs_of(moves))
    chosen = here.index_select(1, pairs[:, 0].to(here.device))
    there.index_copy_(1, pairs[:, 1].to(there.device), chosen.to(there.device))
