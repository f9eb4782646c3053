"""A sequence: one answer in the making, its tokens and its blocks. Mutated by the scheduler alone."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from halyard.runtime.plan import FinishReason, TokenEvent, TokenLogprob, make_event
from halyard.runtime.request import Request

__all__ = ["Sequence", "SequenceStatus"]


class SequenceStatus(Enum):
    """Where a sequence stands. Blocks: WAITING has none, SWAPPED has host blocks only."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and memory of one answer.

    Steps may be in flight: what they compute counts as computed, and a token they sample is pending
    until it is committed. Invariants: num_computed_tokens < num_tokens (the last token's KV is
    written when the next one is sampled); a running sequence holds ceil(num_computed_tokens /
    block_size) device blocks. `block_ids` only ever grows in place: any other change makes a new
    array, so that a copy of it can tell whether it is stale.
    """

    seq_id: int
    request: Request
    index: int  # which of the request's n answers
    token_ids: list[int]  # prompt and answer so far
    num_prompt_tokens: int
    num_computed_tokens: int = (
        0  # tokens whose KV exists once the issued steps have run (on the host if swapped)
    )
    num_pending_tokens: int = 0  # sampled by steps in flight, not known yet
    sample_index: int = -1  # of the pending token, among what its step samples
    block_ids: array[int] = field(default_factory=lambda: array("i"))  # device blocks, in order
    host_block_ids: list[int] = field(default_factory=list)  # while swapped out
    block_digests: list[bytes] = field(default_factory=list)  # of full blocks, as far as computed
    status: SequenceStatus = SequenceStatus.WAITING
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache, first admission
    started: float = 0.0  # time.monotonic() when it first ran; 0: not yet
    num_forks: int = 0  # answers still to be split off at the first sampled token
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # gathered over chunks
    prompt_logprobs_sent: bool = False  # or never asked for
    pooled: NDArray[np.float64] | None = None  # [hidden], gathered over chunks
    in_flight: int = 0  # plans it is part of that are not committed yet
    aborted: bool = False  # given up while in flight: freed at commit
    decodes: bool = False  # its prompt is computed and its answer begun: one token a step
    waits_for: bytes | None = None  # digest of a block that another sequence is computing
    slot: int = -1  # where the batcher keeps its row (row_table.py); of no meaning to the scheduler
    max_len: int = field(init=False)  # tokens at which the answer is as long as it may be
    ends: frozenset[int] = field(init=False)  # tokens that may end it; empty if none does
    pools: bool = field(init=False)  # it gives an embedding: no token is drawn
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.request_id = request.request_id
        params = request.params
        self.max_len = self.num_prompt_tokens + request.max_tokens
        self.pools = request.pooling is not None
        self.ends = request.stop_token_ids
        if not params.ignore_eos:
            self.ends |= request.eos_token_ids

    @classmethod
    def first_of(cls, request: Request, seq_id: int) -> Sequence:
        """The first answer of a new request; the others are forked off it."""
        return cls(
            seq_id=seq_id,
            request=request,
            index=0,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_forks=request.params.n - 1,
            prompt_logprobs_sent=request.params.prompt_logprobs is None,
        )

    def fork(self, seq_id: int, index: int) -> Sequence:
        """Another answer with the same tokens so far, running; it has no blocks yet."""
        return Sequence(
            seq_id=seq_id,
            request=self.request,
            index=index,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            started=self.started,
            prompt_logprobs_sent=True,
            status=SequenceStatus.RUNNING,
        )

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key of service: priority, then arrival."""
        return (self.request.priority, self.request.arrival_time, self.seq_id)

    def mark_started(self) -> None:
        """It runs. The first time counts: until then it queued."""
        self.started = self.started or time.monotonic()

    @property
    def num_tokens(self) -> int:
        """Prompt and answer, pending tokens included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Take in a sampled token. The event says whether the answer ends with it."""
        self.decodes = True
        self.token_ids.append(token)
        reason, stop = None, None
        if token in self.ends or len(self.token_ids) >= self.max_len:
            reason, stop = self.finish_reason(token)
        prompt_logprobs = None
        if not self.prompt_logprobs_sent:
            self.prompt_logprobs_sent = True
            prompt_logprobs = tuple(self.prompt_logprobs)
            self.prompt_logprobs = []
        return make_event(
            (
                self.request_id,
                self.index,
                (token,),
                (logprob,) if logprob is not None else None,
                prompt_logprobs,
                reason,
                stop,
                self.num_cached_tokens,
                None,
                self.started,
                None,
            ),
        )

    def take(self, tokens: tuple[int, ...]) -> TokenEvent:
        """`append` for most tokens: the only one of a sequence that decodes, without its probability."""
        token = tokens[0]
        self.token_ids.append(token)
        reason, stop = None, None
        if token in self.ends or len(self.token_ids) >= self.max_len:
            reason, stop = self.finish_reason(token)
        cached, started = self.num_cached_tokens, self.started
        return make_event((self.request_id, self.index, tokens, None, None, reason, stop, cached,
                           None, started, None))  # fmt: skip

    def restart(self) -> None:
        """Everything is computed again: blocks and what was gathered over chunks are gone."""
        self.num_computed_tokens = 0
        self.decodes = False
        self.status = SequenceStatus.WAITING
        self.pooled = None
        if not self.prompt_logprobs_sent:
            self.prompt_logprobs.clear()

    def pool(self, vector: NDArray[np.float32]) -> None:
        """Take in what a row of a step gave."""
        self.pooled = vector.astype(np.float64) if self.pooled is None else self.pooled + vector

    def embedded(self) -> TokenEvent:
        """The one event of a request that pools, when its last row is done."""
        if self.pooled is None:
            raise AssertionError(f"sequence {self.seq_id} ended with nothing pooled")
        count = len(self.token_ids) if self.request.pooling == "mean" else 1
        return TokenEvent(
            self.request.request_id,
            self.index,
            finish_reason="stop",
            num_cached_tokens=self.num_cached_tokens,
            started=self.started,
            embedding=(self.pooled / count).astype("<f4").tobytes(),
        )

    def finish_reason(self, token: int) -> tuple[FinishReason | None, int | None]:
        """Does the answer end with `token`, its last one? (why, the stop token that ended it)."""
        request = self.request
        count = self.num_answer_tokens
        ends = token in request.eos_token_ids
        stops = token in request.stop_token_ids
        if (ends or stops) and count >= request.params.min_tokens:
            if ends and not request.params.ignore_eos:
                return "stop", None
            if stops:
                return "stop", token
        return ("length", None) if count >= request.max_tokens else (None, None)
