"""Which tokens a penalised sequence holds and how often it answered them, kept from step to step.

A step adds the tokens that are new, whatever the context's length. The counts lie where logits do.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halyard.runtime.sequence import Sequence, SequenceStatus

__all__ = ["CountUpdate", "TokenCounts"]

_LEAST_SLOTS = 4


@dataclass(frozen=True, slots=True)
class CountUpdate:
    """What a step changes before it reads."""

    slots: NDArray[np.int64]  # [rows] which counts the step's rows read
    blank: NDArray[np.int64]  # slots that start anew
    num_slots: int  # that must exist
    places: NDArray[np.int64]  # [2, n] (slot, token) seen
    answers: NDArray[np.int64]  # [2, m] (slot, token) answered, once each time
    pending: NDArray[np.int64]  # [2, p] (slot, sample of the step before) answered, not known yet


class TokenCounts:
    """Counts of all penalised sequences of one engine."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._owners: list[Sequence | None] = [None] * _LEAST_SLOTS
        self._slots: dict[int, int] = {}  # by id of the sequence, which its owner keeps alive
        self._consumed = np.zeros(_LEAST_SLOTS, np.int64)
        # Most steps have the rows of the step before, each a token further.
        self._last: list[Sequence] = []
        self._last_slots = np.empty(0, np.int64)
        self._last_prompts = np.empty(0, np.int64)  # their prompts' tokens
        self._seen: Tensor | None = None  # [slots, vocab] bool
        self._answered: Tensor | None = None  # [slots, vocab] fp32

    def plan(
        self, sequences: Rows[Sequence], positions: Rows[int], sources: Rows[int]
    ) -> CountUpdate:
        """What must be added so that each row's first `positions` [rows] tokens are counted.

        Args:
            sources: [rows] which sample of the step before a row's last token is; -1: it is known.
        """
        ends = np.asarray(positions, np.int64)
        before = np.asarray(sources, np.int64)
        if sequences == self._last:
            update = self._next(sequences, ends, before)
            if update is not None:
                return update
        blank: list[int] = []
        rows: list[int] = []
        for sequence in sequences:
            slot = self._slots.get(id(sequence))
            if slot is None:
                slot = self._take(sequence)
                blank.append(slot)
            rows.append(slot)
        slots = np.array(rows, np.int64)
        seen: list[tuple[int, int]] = []
        answers: list[tuple[int, int]] = []
        pending: list[tuple[int, int]] = []
        for sequence, slot, position, source in zip(
            sequences, rows, ends.tolist(), before.tolist(), strict=True
        ):
            first = int(self._consumed[slot])
            if source >= 0 and first < position:
                pending.append((slot, source))
            for place in range(first, position - (source >= 0)):
                pair = (slot, sequence.token_ids[place])
                seen.append(pair)
                if place >= sequence.num_prompt_tokens:
                    answers.append(pair)
            self._consumed[slot] = max(first, position)
        # One that is to be forked comes several times, but is counted once: not for `_next`.
        self._last = list(sequences) if len(set(rows)) == len(rows) else []
        self._last_slots = slots
        self._last_prompts = np.array([s.num_prompt_tokens for s in sequences], np.int64)

        def pairs(found: list[tuple[int, int]]) -> NDArray[np.int64]:
            return np.array(found, np.int64).reshape(-1, 2).T

        return CountUpdate(
            slots,
            np.array(blank, np.int64),
            len(self._owners),
            pairs(seen),
            pairs(answers),
            pairs(pending),
        )

    def _next(
        self, sequences: Rows[Sequence], ends: NDArray[np.int64], before: NDArray[np.int64]
    ) -> CountUpdate | None:
        """The update where the rows are those of the last call, each at most one token further."""
        slots = self._last_slots
        first = self._consumed[slots]
        new = ends - first
        if (new > 1).any():
            return None
        waits = (new == 1) & (before >= 0)
        known = np.flatnonzero((new == 1) & (before < 0))
        places = first[known]
        tokens = [
            sequences[row].token_ids[place]
            for row, place in zip(known.tolist(), places.tolist(), strict=True)
        ]
        pairs = np.empty((2, len(known)), np.int64)
        pairs[0], pairs[1] = slots[known], tokens
        self._consumed[slots] = np.maximum(first, ends)
        return CountUpdate(
            slots,
            np.empty(0, np.int64),
            len(self._owners),
            pairs,
            pairs[:, places >= self._last_prompts[known]],
            np.stack([slots[waits], before[waits]]),
        )

    def places(self, update: CountUpdate) -> list[NDArray[np.int64]]:
        """What `apply` needs of an update where the counts lie: lines of them, and places within."""
        width = self.vocab_size
        return [
            update.blank,
            update.places[0] * width + update.places[1],
            update.answers[0] * width + update.answers[1],
            update.pending[0] * width,
            update.pending[1],
        ]

    def apply(
        self, update: CountUpdate, places: Rows[Tensor], before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Take in an update: (seen [slots, vocab] bool, times answered [slots, vocab] fp32) of all slots.
        Never waits for the device.

        Args:
            places: as `places` gives them, where logits are.
            before: what the step before sampled, for pending tokens.
        """
        blank, tokens, answers, slots, sources = places
        seen, answered = self._counts(update.num_slots, blank.device)
        if len(blank):
            seen.index_fill_(0, blank, False)
            answered.index_fill_(0, blank, 0.0)
        flat_seen, flat_answered = seen.view(-1), answered.view(-1)
        if len(tokens):
            flat_seen.index_fill_(0, tokens, True)
        if len(answers):
            _count(flat_answered, answers)
        if len(slots):
            if before is None:
                raise AssertionError("a token is pending that nobody samples")
            pending = slots + before.index_select(0, sources)
            flat_seen.index_fill_(0, pending, True)
            _count(flat_answered, pending)
        return seen, answered

    def _counts(self, num_slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._seen is None or self._answered is None or len(self._seen) < num_slots:
            shape = (num_slots, self.vocab_size)
            seen = torch.zeros(shape, dtype=torch.bool, device=device)
            answered = torch.zeros(shape, device=device)
            if self._seen is not None and self._answered is not None:
                seen[: len(self._seen)] = self._seen
                answered[: len(self._answered)] = self._answered
            self._seen, self._answered = seen, answered
        return self._seen, self._answered

    def _take(self, sequence: Sequence) -> int:
        if None not in self._owners:
            self._sweep()
        if None not in self._owners:
            self._consumed = np.concatenate([self._consumed, np.zeros_like(self._consumed)])
            self._owners += [None] * len(self._owners)
        slot = self._owners.index(None)
        self._owners[slot] = sequence
        self._slots[id(sequence)] = slot
        self._consumed[slot] = 0
        return slot

    def _sweep(self) -> None:
        """Forget sequences that have ended."""
        for slot, owner in enumerate(self._owners):
            if owner is not None and owner.status is SequenceStatus.FINISHED:
                del self._slots[id(owner)]
                self._owners[slot] = None


def _count(counts: Tensor, places: Tensor) -> None:
    """One more at each of the places, as often as it is among them: whole numbers, in any order."""
    one = torch.ones((), dtype=counts.dtype, device=counts.device)
    counts.scatter_add_(0, places, one.expand(len(places)))
