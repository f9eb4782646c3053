"""What crosses between scheduler, executor and client, as data: plans, outputs, events. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halyard.hal.types import BlockMove

if TYPE_CHECKING:
    from halyard.runtime.sequence import Sequence

__all__ = [
    "FinishReason",
    "PlanRow",
    "StepOutput",
    "StepPlan",
    "TokenEvent",
    "TokenLogprob",
    "make_event",
    "make_row",
]

FinishReason = Literal["stop", "length", "abort", "error"]


class PlanRow(NamedTuple):
    """One sequence's share of a step: tokens start .. start + num_tokens of its token list.

    Like TokenEvent a named tuple: there are hundreds a step, and a frozen dataclass takes several
    times as long to make.
    """

    sequence: Sequence  # read-only for everyone but the scheduler
    start: int  # tokens whose KV exists already; the first position computed in this step
    num_tokens: int  # >= 1
    num_samples: int  # 0: the row ends before the prompt does; n > 1: first answer token of n forks
    # ^ of a request that pools, 1 means: its prompt ends here
    source: int = -1  # >= 0: its token is that sample of the step before, unknown to the host yet

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


make_row: Callable[[tuple[Any, ...]], PlanRow] = partial(tuple.__new__, PlanRow)
"""All fields of a PlanRow -> it, without checks: for the hundreds a step of running sequences."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The scheduler's decision for one step: token counts, no phases.

    Order of execution: swap_out, swap_in, copies, then rows.
    """

    step: int  # counts from 0
    rows: tuple[PlanRow, ...]
    num_tokens: int  # sum over rows
    num_samples: int  # likewise
    num_prompt_tokens: int  # of num_tokens, those of prompts
    swap_out: tuple[BlockMove, ...] = ()  # device -> host
    swap_in: tuple[BlockMove, ...] = ()  # host -> device
    copies: tuple[BlockMove, ...] = ()  # device -> device (copy on write)


class TokenLogprob(NamedTuple):
    """Natural-log probabilities of one token, from the model's own distribution (before penalties)."""

    token_id: int
    logprob: float
    rank: int  # 1: the most likely token
    top: tuple[tuple[int, float], ...]  # the most likely (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed, on the host. Entry r belongs to plan.rows[r]."""

    token_ids: tuple[tuple[int, ...], ...]  # row.num_samples tokens each
    logprobs: tuple[tuple[TokenLogprob, ...] | None, ...]  # like token_ids; None: not asked for
    prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...]
    # ^ for prompt tokens start + 1 .. min(end, prompt length - 1) of rows whose params ask for them
    errors: tuple[tuple[int, str], ...] = ()  # (row, text): rows whose tokens are void, and why
    pooled: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    # ^ by row, of requests that pool: [hidden], the sum over its tokens, or the prompt's last one


class TokenEvent(NamedTuple):
    """News about one sequence of a request, in order; the last one has a finish reason."""

    request_id: str
    index: int  # type: ignore[assignment]  # which of the n answers; hides tuple.index on purpose
    token_ids: tuple[int, ...] = ()  # new answer tokens (a stop token is included)
    logprobs: tuple[TokenLogprob, ...] | None = None  # one a new token
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # all of them, once, on index 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string; None for eos
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    error: str | None = None  # with finish_reason "error"
    started: float = 0.0  # time.monotonic() when its first step was planned; 0: never
    embedding: bytes | None = (
        None  # of a request that pools, once: float32 [hidden], not normalised
    )


make_event: Callable[[tuple[Any, ...]], TokenEvent] = partial(tuple.__new__, TokenEvent)
"""All fields of a TokenEvent -> it, without checks."""
