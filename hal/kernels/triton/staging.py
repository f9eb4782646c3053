"""Swaps in pieces: a kernel gathers blocks on the device, copy engines move whole ones over the link.

A block is a piece of memory for each layer on the device, and a single one on the host (GpuDevice).
Copy engines reach the link's rate with pieces of some hundred KiB and leave the cores to a step that
runs beside; the gather between the pool and a buffer takes a thirtieth of the link's time, and hides
behind the copies of the buffer before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halyard.hal.kernels.triton.batch_copy import batch_copy
from halyard.hal.kernels.triton.moves import launch_moves, pairs_of, words_of
from halyard.hal.types import KVPool

__all__ = ["PIECE_BYTES", "Run", "StagedSwap", "runs_of"]

PIECE_BYTES = 32 << 20  # of two buffers each

_gpu: Any = torch.cuda  # its annotations differ between torch releases


class Run(NamedTuple):
    """Neighbouring blocks of the host in neighbouring places of a buffer."""

    place: int
    block: int
    length: int


def runs_of(host_blocks: Sequence[int]) -> list[Run]:
    """The blocks that a buffer holds, in ascending order, as few copies as there can be."""
    runs: list[Run] = []
    first = 0
    for place in range(1, len(host_blocks) + 1):
        if place == len(host_blocks) or host_blocks[place] != host_blocks[place - 1] + 1:
            runs.append(Run(first, host_blocks[first], place - first))
            first = place
    return runs


class _Buffer:
    """Room for some blocks on the device, and when it may be used."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.empty(shape, dtype=dtype, device=device)  # [blocks, layers, ...]
        self.words = words_of(self.data.transpose(0, 1))
        self.filled = _gpu.Event()
        self.free = _gpu.Event()


class _Piece(NamedTuple):
    """What goes through a buffer at a time."""

    buffer: _Buffer
    gather: Tensor  # [blocks, 2] int64 on the device: what launch_moves is to do
    blocks: list[int]  # of the host, ascending


class StagedSwap:
    """Moves between a device pool and a host pool whose blocks lie in one piece.

    As seen from the current stream a swap is one operation: it begins after all that was issued, and
    all that is issued later begins after it.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._buffers: list[_Buffer] = []
        # Ahead of a step that runs beside: short kernels, and the link waits for them.
        self._gathers = _gpu.Stream(device, priority=-1)
        self._begun, self._ended = _gpu.Event(), _gpu.Event()

    @staticmethod
    def takes(host: KVPool) -> bool:
        """Whether the blocks of this host pool lie in one piece each."""
        return host.host and host.data.transpose(0, 1).is_contiguous()

    def swap_out(self, pool: KVPool, host: KVPool, pairs: Sequence[tuple[int, int]]) -> None:
        """pairs: block of the pool, block of the host."""
        current, gathers = _gpu.current_stream(self._device), self._gathers
        self._begun.record(current)
        with _gpu.stream(gathers):
            gathers.wait_event(self._begun)
            words, link = words_of(pool.data), None
            for piece in self._pieces(host, pairs, (0, 1)):
                buffer = piece.buffer
                gathers.wait_event(buffer.free)
                launch_moves(words, buffer.words, piece.gather)
                buffer.filled.record(gathers)
                link = link or _Link(host, current)
                current.wait_event(buffer.filled)
                link.copy(buffer.data, runs_of(piece.blocks), out=True)
                buffer.free.record(current)

    def swap_in(self, pool: KVPool, host: KVPool, pairs: Sequence[tuple[int, int]]) -> None:
        """pairs: block of the pool, block of the host."""
        current, gathers = _gpu.current_stream(self._device), self._gathers
        self._begun.record(current)
        with _gpu.stream(gathers):
            gathers.wait_event(self._begun)
            words, link = words_of(pool.data), _Link(host, current)
            for piece in self._pieces(host, pairs, (1, 0)):
                buffer = piece.buffer
                current.wait_event(buffer.free)
                link.copy(buffer.data, runs_of(piece.blocks), out=False)
                buffer.filled.record(current)
                gathers.wait_event(buffer.filled)
                launch_moves(buffer.words, words, piece.gather)
                buffer.free.record(gathers)
            self._ended.record(gathers)
        current.wait_event(self._ended)

    def _pieces(
        self, host: KVPool, pairs: Sequence[tuple[int, int]], columns: tuple[int, int]
    ) -> Iterator[_Piece]:
        """In the order of the host's blocks, so that neighbours there are one copy.

        columns: where a row of the gather has the pool's block and the place in the buffer.
        """
        if not pairs:
            return
        whole, block_bytes = host.data.transpose(0, 1), host.layout.bytes_per_block
        most = min(max(1, self._piece_bytes // block_bytes), whole.shape[0])
        first = max(1, most // 8)  # the link is idle while the first piece is gathered
        shape = (most, *whole.shape[1:])
        if not self._buffers or self._buffers[0].data.shape != shape:
            _gpu.synchronize(self._device)  # older ones may be in use
            self._buffers = [_Buffer(shape, whole.dtype, self._device) for _ in range(2)]
        table = pairs_of(pairs)
        table = table[table[:, 1].argsort()]
        count = len(table)
        order = np.empty_like(table)
        order[:, columns[0]] = table[:, 0]
        order[:first, columns[1]] = np.arange(min(first, count))
        order[first:, columns[1]] = np.arange(max(count - first, 0)) % most
        gather = torch.from_numpy(order).to(self._device, non_blocking=True)
        blocks = table[:, 1].tolist()
        cuts = [0, *range(first, count, most), count]
        for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
            yield _Piece(self._buffers[number % 2], gather[begin:end], blocks[begin:end])


class _Link:
    """Copies between buffers and one host pool, on one stream."""

    def __init__(self, host: KVPool, stream: Any) -> None:
        self._whole = host.data.transpose(0, 1)
        self._base = self._whole.data_ptr()
        self._size = host.layout.bytes_per_block
        self._stream = stream
        # The runtime's copy of many pieces takes no default stream; pageable memory copies wait.
        self._batch = batch_copy() if stream.cuda_stream and self._whole.is_pinned() else None

    def copy(self, buffer: Tensor, runs: list[Run], out: bool) -> None:
        if self._batch is not None:
            places, blocks, lengths = np.array(runs, np.uint64).T * np.uint64(self._size)
            here, there = places + np.uint64(buffer.data_ptr()), blocks + np.uint64(self._base)
            source, target = (here, there) if out else (there, here)
            self._batch(source, target, lengths, self._stream.cuda_stream)
            return
        with _gpu.stream(self._stream):
            for run in runs:
                block = self._whole[run.block : run.block + run.length]
                place = buffer[run.place : run.place + run.length]
                (block if out else place).copy_(place if out else block, non_blocking=True)
