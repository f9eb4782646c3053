"""What is kept of each running sequence from step to step, so that a step costs what changes.

A sequence has a slot while it runs: a row of the block table, which grows as its blocks do, and a
record of how it is sampled. Slots are given here and taken back when somebody else needs one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from halyard.runtime.samples import RECORD, record_of
from halyard.runtime.sequence import Sequence, SequenceStatus

__all__ = ["RowTable"]

_LEAST_SLOTS = 16


class RowTable:
    """Block tables and sampling records by slot.

    Args:
        max_blocks: most blocks of a sequence.
    """

    def __init__(self, max_blocks: int) -> None:
        self.tables = np.zeros((_LEAST_SLOTS, max_blocks), np.int32)
        self.records = np.zeros(_LEAST_SLOTS, RECORD)
        self._filled = np.zeros(_LEAST_SLOTS, np.int64)  # blocks copied so far
        self._owners: list[Sequence | None] = [None] * _LEAST_SLOTS
        self._sources: list[array[int] | None] = [None] * _LEAST_SLOTS  # what was copied
        self._free = list(range(_LEAST_SLOTS))
        self.version = 0  # changes when the rows asked for are not those of the last call
        # Most steps have the rows of the step before. Blocks equal those lists only by identity:
        # what they hold is compared too, but an equal table is as good as the same one.
        self._last_sequences: Rows[Sequence] = ()
        self._last_blocks: list[array[int]] = []
        self._last_slots = np.empty(0, np.int64)

    def slots(self, sequences: Rows[Sequence], num_blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots [n] of running sequences, their first `num_blocks` [n] block ids in place."""
        blocks = [s.block_ids for s in sequences]
        if sequences != self._last_sequences or blocks != self._last_blocks:
            owners, sources = self._owners, self._sources
            for s in sequences:
                if owners[s.slot] is not s or sources[s.slot] is not s.block_ids:
                    self._refresh(s)
            self._last_slots = np.array([s.slot for s in sequences], np.int64)
            self._last_sequences, self._last_blocks = sequences, blocks
            self.version += 1
        slots = self._last_slots
        filled = self._filled[slots]
        for number in np.flatnonzero(filled < num_blocks).tolist():
            sequence, first, last = sequences[number], filled[number], num_blocks[number]
            self.tables[sequence.slot, first:last] = sequence.block_ids[first:last]
            self._filled[sequence.slot] = last
        return slots

    def release(self) -> None:
        """With nothing running: let go of what ran. Hundreds of sequences take milliseconds to free, for
        which the next step would wait."""
        self._last_sequences, self._last_blocks = (), []
        self._sweep()

    def _refresh(self, sequence: Sequence) -> None:
        """Another sequence's slot, or its own whose blocks have changed: copied anew."""
        if self._owners[sequence.slot] is not sequence:
            slot = self._take()
            self._owners[slot] = sequence
            self.records[slot] = record_of(sequence)
            sequence.slot = slot
        self._sources[sequence.slot] = sequence.block_ids
        self._filled[sequence.slot] = 0

    def _take(self) -> int:
        if not self._free:
            self._sweep()
        if not self._free:
            self._grow()
        return self._free.pop()

    def _sweep(self) -> None:
        """Take back the slots of sequences that run no more."""
        for slot, owner in enumerate(self._owners):
            if owner is not None and owner.status is not SequenceStatus.RUNNING:
                self._owners[slot] = self._sources[slot] = None
                self._free.append(slot)

    def _grow(self) -> None:
        count = len(self._owners)
        self._free.extend(range(count, 2 * count))
        self._owners += [None] * count
        self._sources += [None] * count
        self.tables = np.concatenate([self.tables, np.zeros_like(self.tables)])
        self.records = np.concatenate([self.records, np.zeros_like(self.records)])
        self._filled = np.concatenate([self._filled, np.zeros_like(self._filled)])
