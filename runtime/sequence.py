"""A sequence: one answer in the making, its tokens and its blocks. Mutated by the scheduler alone."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from enum import Enum

from halyard.runtime.plan import FinishReason, TokenLogprob
from halyard.runtime.request import Request

__all__ = ["Sequence", "SequenceStatus", "check_queues"]


class SequenceStatus(Enum):
    """Where a sequence stands. Blocks: WAITING has none, SWAPPED has host blocks only."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and memory of one answer.

    Invariants: num_computed_tokens < len(token_ids) between steps (the last token's KV is written
    when the next one is sampled); a running sequence holds ceil(num_computed_tokens / block_size)
    device blocks between steps.
    """

    seq_id: int
    request: Request
    index: int  # which of the request's n answers
    token_ids: list[int]  # prompt and answer so far
    num_prompt_tokens: int
    num_computed_tokens: int = (
        0  # tokens whose KV exists (on the device, or on the host if swapped)
    )
    block_ids: array[int] = field(default_factory=lambda: array("i"))  # device blocks, in order
    host_block_ids: list[int] = field(default_factory=list)  # while swapped out
    block_digests: list[bytes] = field(default_factory=list)  # of full blocks, as far as computed
    status: SequenceStatus = SequenceStatus.WAITING
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache, first admission
    started: float = 0.0  # time.monotonic() when it first ran; 0: not yet
    num_forks: int = 0  # answers still to be split off at the first sampled token
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # gathered over chunks
    prompt_logprobs_sent: bool = False  # or never asked for
    in_flight: bool = False  # part of a plan that is not committed yet
    aborted: bool = False  # given up while in flight: freed at commit
    waits_for: bytes | None = None  # digest of a block that another sequence is computing

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key of service: priority, then arrival."""
        return (self.request.priority, self.request.arrival_time, self.seq_id)

    def mark_started(self) -> None:
        """It runs. The first time counts: until then it queued."""
        self.started = self.started or time.monotonic()

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

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


def check_queues(
    running: list[Sequence], waiting: list[Sequence], swapped: list[Sequence], block_size: int
) -> None:
    """Raise AssertionError if a sequence is in the wrong queue, or has lost its blocks."""
    for name, sequences in (("running", running), ("waiting", waiting), ("swapped", swapped)):
        for sequence in sequences:
            if sequence.status.value != name:
                raise AssertionError(f"sequence {sequence.seq_id} is misfiled as {name}")
            if sequence.num_computed_tokens >= len(sequence.token_ids):
                raise AssertionError(f"sequence {sequence.seq_id} has nothing left to compute")
            held = len(sequence.block_ids) + len(sequence.host_block_ids)
            if held * block_size < sequence.num_computed_tokens:
                raise AssertionError(f"sequence {sequence.seq_id} lacks blocks")
        orders = [sequence.order for sequence in sequences]
        if name != "waiting" and sorted(orders) != orders:
            raise AssertionError(f"the {name} list is out of order")
