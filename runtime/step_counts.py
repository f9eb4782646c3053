"""What a step's rows come to, counted while they are planned. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

from halyard.runtime.kv_manager import Moves
from halyard.runtime.plan import PlanRow, StepPlan
from halyard.runtime.sequence import Sequence

__all__ = ["StepCounts"]


@dataclass(slots=True)
class StepCounts:
    """Sums over the rows planned so far, named as in StepPlan."""

    num_tokens: int = 0
    num_samples: int = 0
    num_prompt_tokens: int = 0

    def add(self, sequence: Sequence, start: int, num_tokens: int, samples: int) -> None:
        """A row with tokens from `start` on: its sequence is in flight from here on."""
        sequence.in_flight += 1
        self.num_tokens += num_tokens
        if start < sequence.num_prompt_tokens:
            self.num_prompt_tokens += min(num_tokens, sequence.num_prompt_tokens - start)
        if samples:
            sequence.num_pending_tokens += 1
            sequence.sample_index = self.num_samples
            self.num_samples += 0 if sequence.pools else samples

    def plan(self, step: int, rows: Rows[PlanRow], moves: Moves) -> StepPlan:
        """The plan of these rows."""
        return StepPlan(
            step=step,
            rows=tuple(rows),
            num_tokens=self.num_tokens,
            num_samples=self.num_samples,
            num_prompt_tokens=self.num_prompt_tokens,
            swap_out=moves.swap_out,
            swap_in=moves.swap_in,
            copies=moves.copies,
        )
