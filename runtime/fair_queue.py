"""Waiting sequences in the order in which tenants deserve service. No torch.

Priority comes first. Among equal priorities a tenant's turn comes by the service it has had: every
computed token is charged to its account, divided by its share, and the lowest account goes next.
A tenant that comes back from idling starts at the lowest account of those at work, so that nobody
saves up service; one that had more than that keeps its debt.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

from halyard.runtime.request import Request
from halyard.runtime.sequence import Sequence

__all__ = ["ANSWER_COST", "FairQueue"]

ANSWER_COST = 2  # an answer's token against one of a prompt: it reads all weights for one row

_ORDER = attrgetter("order")


class FairQueue:
    """Two things: the queue itself, and accounts of all tenants with requests in the scheduler.

    `enter` and `leave` frame a request's life; `add` and `remove` a sequence's time in the queue.
    """

    def __init__(self) -> None:
        self._lanes: dict[int, dict[str, list[Sequence]]] = {}  # priority -> tenant -> by order
        self._size = 0
        self._alive: Counter[str] = Counter()  # tenant -> requests that have not ended
        self._served: dict[str, float] = {}  # tenant -> its account
        self.contended = False  # whether several tenants have requests: else no account matters

    # -- accounts -----------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """A request begins."""
        tenant = request.tenant
        if not self._alive[tenant]:
            floor = self._floor()
            self._served[tenant] = max(self._served.get(tenant, floor), floor)
        self._alive[tenant] += 1
        self.contended = len(self._alive) > 1

    def leave(self, request: Request) -> None:
        """A request has ended."""
        tenant = request.tenant
        self._alive[tenant] -= 1
        if self._alive[tenant]:
            return
        del self._alive[tenant]
        self.contended = len(self._alive) > 1
        floor = self._floor()
        for name in [n for n, had in self._served.items() if n not in self._alive]:
            if not self._alive or self._served[name] <= floor:
                del self._served[name]  # it would be lifted to the floor anyway

    def charge(self, request: Request, cost: int) -> None:
        """Service for a request, in prompt tokens' worth."""
        self._served[request.tenant] += cost / request.share

    def account(self, tenant: str) -> float:
        """Service so far, for comparing tenants that have requests."""
        return self._served.get(tenant, 0.0)

    def victim(self, running: list[Sequence], position: int) -> Sequence:
        """Who gives way, among those from `position` on: they have no row yet."""
        last = running[-1]
        if not self.contended:
            return last
        rank = last.request.priority
        behind = [s for s in running[position:] if s.request.priority == rank]
        return max(behind, key=lambda s: (self.account(s.request.tenant), s.order), default=last)

    def _floor(self) -> float:
        return min((self._served[tenant] for tenant in self._alive), default=0.0)

    # -- the queue ----------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no order that matters."""
        for lanes in self._lanes.values():
            for lane in lanes.values():
                yield from lane

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        lanes = self._lanes.setdefault(request.priority, {})
        insort(lanes.setdefault(request.tenant, []), sequence, key=_ORDER)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        request = sequence.request
        lanes = self._lanes[request.priority]
        lane = lanes[request.tenant]
        position = bisect_left(lane, sequence.order, key=_ORDER)
        if lane[position] is not sequence:
            raise AssertionError(f"sequence {sequence.seq_id} does not wait here")
        del lane[position]
        self._size -= 1
        if not lane:
            del lanes[request.tenant]
            if not lanes:
                del self._lanes[request.priority]

    def in_turn(self) -> Iterator[Sequence]:
        """Who should be admitted next, again and again.

        The caller may remove and charge the one it was given, nothing else; one that stays in the
        queue is passed over.
        """
        for priority in sorted(self._lanes):
            lanes = self._lanes[priority]
            passed: dict[str, int] = {}
            while True:
                best: tuple[float, Sequence] | None = None
                for tenant, lane in lanes.items():
                    at = passed.get(tenant, 0)
                    if at < len(lane):
                        key = (self._served[tenant], lane[at])
                        if best is None or (key[0], key[1].order) < (best[0], best[1].order):
                            best = key
                if best is None:
                    break
                sequence = best[1]
                before = self._size
                yield sequence
                if self._size == before:
                    tenant = sequence.request.tenant
                    passed[tenant] = passed.get(tenant, 0) + 1

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        if self._size != sum(1 for _ in self):
            raise AssertionError("the queue's size is wrong")
        for priority, lanes in self._lanes.items():
            for tenant, lane in lanes.items():
                if not lane or sorted(lane, key=_ORDER) != lane:
                    raise AssertionError(f"the lane of {tenant!r} is empty or out of order")
                if any((s.request.priority, s.request.tenant) != (priority, tenant) for s in lane):
                    raise AssertionError(f"the lane of {tenant!r} holds others' sequences")
        if self.contended != (len(self._alive) > 1):
            raise AssertionError("it is not known whether tenants compete")
        if any(count < 1 for count in self._alive.values()) or set(self._alive) - set(self._served):
            raise AssertionError("accounts do not fit the requests")
