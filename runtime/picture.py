"""What an engine holds at one moment: every block's state and every sequence. For pages. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from halyard.runtime.scheduler import Scheduler
    from halyard.runtime.sequence import Sequence

__all__ = ["MAX_ROWS", "EnginePicture", "SequenceRow", "take_picture"]

MAX_ROWS = 500  # sequences that are told; the counts are of all


class SequenceRow(NamedTuple):
    """One sequence."""

    request_id: str
    answer: int  # which of the request's answers
    tenant: str
    state: str  # waiting, prefill, decode, swapped
    prompt_tokens: int
    cached_tokens: int  # of these, from the prefix cache
    computed_tokens: int  # whose KV exists
    answer_tokens: int
    max_tokens: int
    blocks: int  # on the device, or on the host if swapped
    arrival: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class EnginePicture:
    """Plain data: it crosses processes. Blocks are one byte each, see `BlockPool.states`."""

    block_size: int
    device_blocks: bytes
    host_blocks: bytes
    num_running: int
    num_waiting: int
    num_swapped: int
    rows: tuple[SequenceRow, ...]  # running ones first, then swapped, then waiting


def take_picture(scheduler: Scheduler) -> EnginePicture:
    """Between two steps. Copies two byte strings and reads at most MAX_ROWS sequences."""
    running, waiting, swapped = scheduler.queues()
    listed = [*running, *swapped, *waiting][:MAX_ROWS]
    return EnginePicture(
        block_size=scheduler.config.block_size,
        device_blocks=scheduler.kv.device.states(),
        host_blocks=scheduler.kv.host.states(),
        num_running=len(running),
        num_waiting=len(waiting),
        num_swapped=len(swapped),
        rows=tuple(map(_row, listed)),
    )


def _row(sequence: Sequence) -> SequenceRow:
    request = sequence.request
    state = sequence.status.value
    if state == "running":
        state = "prefill" if sequence.num_answer_tokens == 0 else "decode"
    return SequenceRow(
        request.request_id,
        sequence.index,
        request.tenant,
        state,
        sequence.num_prompt_tokens,
        sequence.num_cached_tokens,
        sequence.num_computed_tokens,
        max(0, sequence.num_answer_tokens),
        request.max_tokens,
        len(sequence.block_ids) + len(sequence.host_block_ids),
        request.arrival_time,
    )
