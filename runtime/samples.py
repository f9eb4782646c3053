"""Which tokens a step draws, as columns: numbers of all rows side by side, objects only where needed."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from halyard.runtime.plan import PlanRow
    from halyard.runtime.sequence import Sequence

__all__ = [
    "BIASED",
    "FILTERED",
    "GUIDED",
    "LEAST",
    "PENALISED",
    "RANDOM",
    "RECORD",
    "SCORED",
    "SampleRow",
    "Samples",
    "record_of",
]

RANDOM, FILTERED, PENALISED, BIASED, LEAST, GUIDED, SCORED = (1 << bit for bit in range(7))
"""What a row asks for: bits of RECORD's flags. LEAST: it has a least length."""

RECORD = np.dtype(
    [
        ("flags", np.int64),
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),  # 0: all
        ("least", np.int64),  # tokens of prompt and answer before which it may not end
        ("index", np.int64),  # which of the request's answers
    ]
)
"""How a sequence is sampled: constant over its life."""


_ANY_VOCABULARY = 1 << 31  # tokens; no vocabulary has more


def record_of(sequence: Sequence) -> tuple[Any, ...]:
    """The fields of RECORD."""
    request = sequence.request
    params = request.params
    # Users' integers may be of any size; a larger one than these asks for the same.
    top_k = min(max(params.top_k, 0), _ANY_VOCABULARY)
    min_tokens = min(params.min_tokens, request.max_tokens)
    penalised = (
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    )
    flags = (
        RANDOM * (params.temperature > 0 and top_k != 1)
        | FILTERED * (top_k > 0 or params.top_p < 1 or params.min_p > 0)
        | PENALISED * bool(penalised)
        | BIASED * bool(params.logit_bias)
        | LEAST * (min_tokens > 0)
        | GUIDED * (request.guidance is not None)
        | SCORED * (params.logprobs is not None)
    )
    return (
        flags,
        request.seed % 2**64,
        params.temperature,
        params.top_p,
        params.min_p,
        top_k,
        sequence.num_prompt_tokens + min_tokens,
        sequence.index,
    )


class SampleRow(NamedTuple):
    """One token to draw: the logits row it is drawn from and the answer it continues."""

    row: PlanRow
    answer_index: int  # which of the request's n answers
    logits_row: int  # index into the logits of the step


@dataclass(frozen=True, slots=True)
class Samples:
    """The tokens to draw in a step, in plan row order, then answer order."""

    sequences: Rows[Sequence]  # [n]; a sequence that is to be forked comes several times
    positions: NDArray[np.int64]  # [n] tokens before the drawn one
    answers: NDArray[np.int64]  # [n] which of the request's answers
    logits_rows: NDArray[np.int64]  # [n] indices into the logits of the step
    identity: bool  # logits_rows are 0 .. n - 1, and the step has no other logits
    records: NDArray[np.void]  # [n] RECORD
    sources: NDArray[
        np.int64
    ]  # [n] >= 0: the last token is that sample of the step before, pending

    def __len__(self) -> int:
        return len(self.sequences)

    @classmethod
    def of(cls, rows: Iterable[SampleRow], num_logits: int) -> Samples:
        """From rows one by one: for a few of them."""
        rows = list(rows)
        sequences = [row.row.sequence for row in rows]
        logits_rows = np.array([row.logits_row for row in rows], np.int64)
        return cls(
            sequences,
            np.array([row.row.end for row in rows], np.int64),
            np.array([row.answer_index for row in rows], np.int64),
            logits_rows,
            len(rows) == num_logits and bool((logits_rows == np.arange(len(rows))).all()),
            np.array([record_of(sequence) for sequence in sequences], RECORD),
            np.array([row.row.source for row in rows], np.int64),
        )

    def having(self, flag: int) -> NDArray[np.int64]:
        """Positions of the samples that ask for something."""
        found: NDArray[np.int64] = np.flatnonzero(self.records["flags"] & flag)
        return found
