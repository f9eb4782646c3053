"""Fair shares among tenants: bounds on who gets how much, and no one waits for ever."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from scheduler_model import SimulatedDevice, request

from halyard.runtime.config import SchedulerConfig
from halyard.runtime.fair_queue import FairQueue
from halyard.runtime.plan import StepPlan
from halyard.runtime.request import Request
from halyard.runtime.scheduler import Scheduler
from halyard.runtime.sequence import Sequence


class Bench:
    """A scheduler on a simulated device that counts which tenant's tokens are computed."""

    def __init__(self, **options: int) -> None:
        defaults = {
            "num_blocks": 64,
            "max_model_len": 64,
            "block_size": 4,
            "max_num_sequences": 4,
            "max_batched_tokens": 32,
        }
        self.scheduler = Scheduler(SchedulerConfig(**(defaults | options)))
        self.device = SimulatedDevice(self.scheduler)
        self.served: Counter[str] = Counter()
        self.finished: list[str] = []
        self.number = 0

    def flood(self, tenant: str, count: int, *, share: float = 1.0, priority: int = 0) -> None:
        for _ in range(count):
            self.number += 1
            prompt = [self.number % 40 + 1] * (5 + self.number % 7)
            self.scheduler.add(
                request(
                    f"{tenant}{self.number}",
                    prompt,
                    arrival=float(self.number),
                    tenant=tenant,
                    share=share,
                    priority=priority,
                    max_tokens=6,
                    ignore_eos=True,
                )
            )

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        for row in plan.rows:
            self.served[row.sequence.request.tenant] += row.num_tokens
        for event in self.scheduler.commit(plan, self.device.run(plan)):
            if event.finish_reason:
                self.finished.append(event.request_id)
        self.scheduler.check_integrity()
        return plan


def test_a_flood_of_one_tenant_does_not_hold_another_back() -> None:
    bench = Bench()
    bench.flood("a", 200)
    for _ in range(5):
        bench.step()
    bench.flood("b", 10)
    while sum(name.startswith("b") for name in bench.finished) < 10:
        bench.step()
    # In order of arrival all 200 would have gone first.
    assert sum(name.startswith("a") for name in bench.finished) < 25


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_service_follows_shares(share: float) -> None:
    bench = Bench()
    bench.flood("a", 400)
    bench.flood("b", 400, share=share)
    for _ in range(250):
        bench.step()
    ratio = bench.served["b"] / bench.served["a"]
    assert share * 0.8 < ratio < share * 1.2, bench.served


def test_priority_comes_before_fairness_and_who_waits_is_served_in_the_end() -> None:
    bench = Bench()
    bench.flood("low", 20, priority=1)
    bench.flood("high", 40, priority=0)
    bench.flood("mid", 40, priority=0)
    while bench.scheduler.has_work():
        bench.step()
    assert len(bench.finished) == 100
    last_urgent = max(n for n, name in enumerate(bench.finished) if not name.startswith("low"))
    assert sum(name.startswith("low") for name in bench.finished[:last_urgent]) <= 4  # ran already


def test_idling_saves_nothing_up_and_forgives_nothing() -> None:
    bench = Bench()
    bench.flood("a", 300)
    bench.flood("b", 5)
    for _ in range(100):
        bench.step()
    assert not any(s.request.tenant == "b" for s in bench.scheduler._waiting)
    before = Counter(bench.served)
    bench.flood("b", 300)  # had nothing for long: no right to more than half from now on
    for _ in range(100):
        bench.step()
    gained = bench.served - before
    assert 0.75 < gained["b"] / gained["a"] < 1.35, gained


def test_under_pressure_the_heaviest_tenant_gives_way() -> None:
    bench = Bench(num_blocks=20, max_model_len=64, max_num_sequences=8)
    bench.flood("a", 60)
    for _ in range(4):
        bench.step()
    bench.flood("b", 12)
    steps = 0
    while sum(name.startswith("b") for name in bench.finished) < 12:
        bench.step()
        steps += 1
    assert steps < 120
    while bench.scheduler.has_work():
        bench.step()
    assert len(bench.finished) == 72
    assert bench.scheduler.stats().blocks_used == 0


@pytest.mark.parametrize("seed", range(4))
def test_nobody_starves_under_random_traffic(seed: int) -> None:
    """With equal shares no tenant that has work falls behind another by more than a bound."""
    rng = random.Random(seed)
    bench = Bench(num_blocks=40)
    tenants = [f"t{number}" for number in range(2 + seed)]
    behind: Counter[str] = Counter()  # steps since a tenant with work was last served
    for _ in range(400):
        if rng.random() < 0.5 and len(bench.scheduler._waiting) < 60:
            bench.flood(rng.choice([tenants[0], *tenants]), rng.randrange(1, 6))
        if not bench.scheduler.has_work():
            continue
        plan = bench.step()
        served = {row.sequence.request.tenant for row in plan.rows}
        waiting = {s.request.tenant for s in bench.scheduler._waiting}
        for tenant in tenants:
            behind[tenant] = behind[tenant] + 1 if tenant in waiting - served else 0
            assert behind[tenant] < 40, f"{tenant} starves"
    while bench.scheduler.has_work():
        bench.step()
    assert len(bench.finished) == bench.number
    assert not bench.scheduler._waiting._served  # accounts of those that left are closed


def test_the_queue_against_a_list() -> None:
    """Random calls: what it holds is right, and each turn goes to the lowest account."""
    rng = random.Random(3)
    queue = FairQueue()
    held: list[Sequence] = []
    alive: list[Request] = []
    for number in range(3000):
        if rng.random() < 0.4 or not alive:
            made = request(
                f"r{number}", [1], arrival=rng.random(), tenant=rng.choice("abc"),
                priority=rng.choice([0, 0, 1]), share=rng.choice([1.0, 2.0]),
            )  # fmt: skip
            sequence = Sequence(number, made, 0, [1], 1)
            queue.enter(made)
            queue.add(sequence)
            alive.append(made)
            held.append(sequence)
        elif rng.random() < 0.6 and held:
            turn = next(queue.in_turn())
            rank = min(s.request.priority for s in held)
            rivals = [s for s in held if s.request.priority == rank]
            assert turn is min(rivals, key=lambda s: (queue.account(s.request.tenant), s.order))
            queue.remove(turn)
            held.remove(turn)
            queue.charge(turn.request, rng.randrange(1, 50))
        else:
            gone = alive.pop(rng.randrange(len(alive)))
            for sequence in [s for s in held if s.request is gone]:
                queue.remove(sequence)
                held.remove(sequence)
            queue.leave(gone)
        queue.check_integrity()
        assert len(queue) == len(held)
        assert [*queue.in_turn()].__len__() == len(held)
