"""Whole blocks from one pool to another: a gather in one launch, over the link too.

The kernel reads and writes pinned host memory in place, so a swap of scattered blocks is one launch
that keeps the link busy; beside a step the copy engines are better, which leave it the cores. All
of it runs on the current stream: who wants moves beside a step chooses another (CopyingDevice).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from halyard.hal.kernels.triton.batch_copy import BatchCopy
from halyard.hal.types import BlockMove, KVPool

__all__ = ["CHUNK_WORDS", "batch_moves", "copy_moves", "gather_moves", "move_blocks_kernel"]

CHUNK_WORDS = 1024  # 8-byte words a program moves: 8 KiB, 64 B in flight a thread


@triton.jit
def move_blocks_kernel(
    source: tl.tensor, target: tl.tensor, pairs: tl.tensor, source_layer: tl.tensor, target_layer: tl.tensor,
    WORDS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """source, target [layers, blocks, WORDS] int64; pairs [moves, 2] int64.

    Grid: moves, layers, pieces of a block. *_layer: words between layers.
    """
    move = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    inside = word < WORDS
    here = source + layer * source_layer + tl.load(pairs + 2 * move) * WORDS
    there = target + layer * target_layer + tl.load(pairs + 2 * move + 1) * WORDS
    tl.store(there + word, tl.load(here + word, mask=inside), mask=inside)


def gather_moves(
    source: KVPool, target: KVPool, moves: Sequence[BlockMove], device: torch.device
) -> None:
    """One launch for all moves; host pools must be pinned."""
    if not moves:
        return
    pairs = torch.tensor(moves, dtype=torch.int64).to(device, non_blocking=True)
    here, there = _words(source), _words(target)
    words = here.shape[2]
    chunk = min(CHUNK_WORDS, triton.next_power_of_2(words))
    grid = (len(moves), here.shape[0], triton.cdiv(words, chunk))
    move_blocks_kernel[grid](
        here, there, pairs, here.stride(0), there.stride(0), WORDS=words, CHUNK=chunk, num_warps=4
    )


def copy_moves(source: KVPool, target: KVPool, moves: Sequence[BlockMove]) -> None:
    """One copy per layer and run of neighbouring blocks: the copy engines, and pageable memory."""
    for first, last, place in _runs(moves):
        for layer in range(source.data.shape[0]):
            count = last - first
            target.data[layer, place : place + count].copy_(
                source.data[layer, first:last], non_blocking=True
            )


def batch_moves(
    copy: BatchCopy, source: KVPool, target: KVPool, moves: Sequence[BlockMove], stream: int
) -> None:
    """One call for all pieces, of which a run of neighbouring blocks has one a layer."""
    if not moves:
        return
    first, last, place = np.array(_runs(moves), np.uint64).T
    size = np.uint64(source.data[0, :1].nbytes)
    layers = np.arange(source.data.shape[0], dtype=np.uint64)[:, None]

    def addresses(pool: KVPool, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        layer = np.uint64(pool.data.stride(0) * pool.data.element_size())
        return np.uint64(pool.data.data_ptr()) + layers * layer + blocks * size

    sizes = np.broadcast_to((last - first) * size, (len(layers), len(first)))
    copy(addresses(source, first), addresses(target, place), sizes, stream)


def _runs(moves: Sequence[BlockMove]) -> list[tuple[int, int, int]]:
    """Moves as (first source, last source + 1, first target), neighbours put together."""
    runs: list[tuple[int, int, int]] = []
    for source, target in sorted(moves):
        if runs and runs[-1][1] == source and runs[-1][2] + source - runs[-1][0] == target:
            runs[-1] = (runs[-1][0], source + 1, runs[-1][2])
        else:
            runs.append((source, source + 1, target))
    return runs


def _words(pool: KVPool) -> Tensor:
    """The pool as [layers, blocks, words] of 8 bytes: moves copy bits, NaN payloads included."""
    return pool.data.flatten(2).view(torch.int64)
