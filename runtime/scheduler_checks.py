"""Whether the scheduler's books balance: called after every step in tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

from halyard.runtime.kv_manager import KVManager
from halyard.runtime.plan import StepPlan
from halyard.runtime.sequence import Sequence, SequenceStatus

__all__ = ["Books", "check_books"]


@dataclass(frozen=True, slots=True)
class Books:
    """What the scheduler writes down, as its fields are named."""

    kv: KVManager
    running: list[Sequence]
    waiting: list[Sequence]
    swapped: list[Sequence]
    plans: Iterable[StepPlan]  # in flight, in their order
    by_request: Mapping[str, list[Sequence]]
    in_progress: Mapping[bytes, Sequence]
    num_reserved: int


def check_books(books: Books) -> None:
    """Raise AssertionError if they do not balance."""
    flying = [row.sequence for plan in books.plans for row in plan.rows]
    listed = [*books.running, *books.waiting, *books.swapped]
    gone = {id(s): s for s in flying if s.aborted}
    books.kv.check_integrity([*listed, *gone.values()])
    for name, sequences in (
        ("running", books.running),
        ("waiting", books.waiting),
        ("swapped", books.swapped),
    ):
        for sequence in sequences:
            if sequence.status.value != name:
                raise AssertionError(f"sequence {sequence.seq_id} is misfiled as {name}")
        ordered = sorted(sequences, key=attrgetter("order"))
        if name != "waiting" and ordered != sequences:
            raise AssertionError(f"the {name} list is out of order")
    for sequence in listed:
        _check_sequence(sequence, flying, books.kv.block_size)
    _check_moves_ahead(list(books.plans), books.kv.block_size)
    known = [s for own in books.by_request.values() for s in own]
    if sorted(map(id, known)) != sorted(map(id, listed)):
        raise AssertionError("requests and queues do not name the same sequences")
    if books.num_reserved != sum(s.num_forks for s in books.running):
        raise AssertionError("the seats reserved for forks do not add up")
    for digest, sequence in books.in_progress.items():
        if sequence.status is not SequenceStatus.RUNNING or digest not in sequence.block_digests:
            raise AssertionError("a block in progress belongs to nobody")


def _check_moves_ahead(plans: list[StepPlan], block_size: int) -> None:
    """The blocks that a plan made ahead moves are none of the step before: both run at once."""
    for before, plan in pairwise(plans):
        moved = {m.source for m in plan.swap_out} | {m.target for m in plan.swap_in}
        for row in before.rows if moved else ():
            held = row.sequence.block_ids[: -(-row.end // block_size)]
            if not moved.isdisjoint(held):
                raise AssertionError(
                    f"step {plan.step} moves blocks of sequence {row.sequence.seq_id} in flight"
                )


def _check_sequence(sequence: Sequence, flying: list[Sequence], block_size: int) -> None:
    name = f"sequence {sequence.seq_id}"
    if sequence.in_flight != sum(s is sequence for s in flying):
        raise AssertionError(f"{name} is in {sequence.in_flight} plans by its own count")
    if not 0 <= sequence.num_pending_tokens <= sequence.in_flight:
        raise AssertionError(f"{name} waits for {sequence.num_pending_tokens} tokens")
    if sequence.num_computed_tokens >= sequence.num_tokens:
        raise AssertionError(f"{name} has nothing left to compute")
    left = sequence.num_tokens - sequence.num_computed_tokens
    if sequence.decodes and (left != 1 or sequence.num_forks):
        raise AssertionError(f"{name} is said to decode")
    held = len(sequence.block_ids) + len(sequence.host_block_ids)
    if held * block_size < sequence.num_computed_tokens:
        raise AssertionError(f"{name} lacks blocks")
    if sequence.in_flight and sequence.status is not SequenceStatus.RUNNING:
        raise AssertionError(f"{name} is in flight but {sequence.status.value}")
