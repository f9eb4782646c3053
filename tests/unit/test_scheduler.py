"""The scheduler against a simulated device that knows what every slot must hold."""

import random

import pytest
from scheduler_model import Fuzzer, SimulatedDevice, request, run_all

from halyard.runtime.config import SchedulerConfig
from halyard.runtime.cost_model import PreemptionCost
from halyard.runtime.plan import PlanRow, TokenEvent
from halyard.runtime.scheduler import Scheduler
from halyard.runtime.step_limits import StepLimits


def config(**changes: object) -> SchedulerConfig:
    options = {
        "num_blocks": 64,
        "max_model_len": 64,
        "block_size": 4,
        "max_num_sequences": 8,
        "max_batched_tokens": 16,
    }
    return SchedulerConfig(**(options | changes))  # type: ignore[arg-type]


TINY = {"num_blocks": 12, "max_model_len": 40, "block_size": 4, "max_num_sequences": 5}


def tiny_fuzzer(policy: str, host_blocks: int, ahead: float = 0.0) -> Fuzzer:
    return Fuzzer(
        config(
            **TINY,
            max_batched_tokens=9,
            num_host_blocks=host_blocks,
            preemption=policy,
            cost=PreemptionCost(1, 1.0, 4.0),
        ),
        seed=len(policy) * 100 + host_blocks,
        ahead=ahead,
    )


@pytest.mark.parametrize("host_blocks", [0, 6, 30])
@pytest.mark.parametrize("policy", ["auto", "swap", "recompute"])
def test_fuzz(policy: str, host_blocks: int) -> None:
    """10,000 steps in all of random arrivals, aborts, forks and preemptions on tiny pools."""
    fuzzer = tiny_fuzzer(policy, host_blocks)
    for _ in range(1200):
        fuzzer.step()
    fuzzer.drain()
    stats = fuzzer.scheduler.stats()
    assert stats.preemptions_swap + stats.preemptions_recompute > 20
    assert stats.counters.prefix_hits > 0
    assert stats.counters.blocks_copied > 0
    if policy == "swap" and host_blocks == 30:
        assert stats.preemptions_recompute == 0
        assert stats.counters.blocks_swapped_in > 0
    if policy == "recompute":
        assert stats.preemptions_swap == 0


@pytest.mark.parametrize("seed", range(40))
def test_fuzz_over_random_configurations(seed: int) -> None:
    """Blocks of one token, a single seat, a budget of one token a step, no host tier ..."""
    rng = random.Random(seed)
    block_size, num_blocks = rng.choice([1, 2, 3, 4, 16]), rng.randrange(6, 20)
    seats = rng.randrange(1, 7)
    fuzzer = Fuzzer(
        SchedulerConfig(
            num_blocks=num_blocks,
            max_model_len=rng.randrange(6, min(60, num_blocks * block_size) + 1),
            block_size=block_size,
            num_host_blocks=rng.choice([0, 1, 3, 8, 40]),
            max_num_sequences=seats,
            max_batched_tokens=seats + rng.randrange(12),
            prefix_cache=rng.random() < 0.8,
            preemption=rng.choice(["auto", "swap", "recompute"]),  # type: ignore[arg-type]
            cost=PreemptionCost(1, 1.0, rng.choice([0.1, 4.0, 100.0])),
        ),
        seed,
    )
    for _ in range(120):
        fuzzer.step()
    fuzzer.drain()


@pytest.mark.parametrize("host_blocks", [0, 30])
@pytest.mark.parametrize("policy", ["swap", "recompute"])
def test_fuzz_with_late_commits(policy: str, host_blocks: int) -> None:
    """The next step is planned, most of the time, before the last one has run."""
    fuzzer = tiny_fuzzer(policy, host_blocks, ahead=0.9)
    for _ in range(1500):
        fuzzer.step()
    fuzzer.drain()
    stats = fuzzer.scheduler.stats()
    assert fuzzer.planned_ahead > 300
    assert fuzzer.dropped > 20
    assert stats.preemptions_swap + stats.preemptions_recompute > 20
    assert stats.counters.prefix_hits > 0
    assert stats.counters.blocks_copied > 0


@pytest.mark.parametrize("seed", range(20))
def test_planning_ahead_changes_no_answer(seed: int) -> None:
    """Random requests under pressure: priorities, forks, ends by token and by length."""
    rng = random.Random(seed)
    block_size, num_blocks = rng.choice([1, 2, 4, 16]), rng.randrange(10, 24)
    settings = SchedulerConfig(
        num_blocks=num_blocks,
        max_model_len=min(48, num_blocks * block_size),
        block_size=block_size,
        num_host_blocks=rng.choice([0, 3, 40]),
        max_num_sequences=6,
        max_batched_tokens=6 + rng.randrange(12),
        prefix_cache=rng.random() < 0.8,
        preemption=rng.choice(["swap", "recompute"]),  # type: ignore[arg-type]
    )
    top = settings.max_model_len
    shared = [rng.randrange(1, 50) for _ in range(top)]
    requests = []
    for number in range(14):
        prompt = [*shared[: rng.randrange(top // 3)], *[rng.randrange(1, 50)] * rng.randrange(1, 4)]
        requests.append(
            request(
                f"r{number}",
                prompt,
                arrival=float(number),
                priority=rng.choice([0, 0, 1]),
                n=rng.choice([1, 1, 1, 3]),
                max_tokens=rng.randrange(1, top - len(prompt)),
                ignore_eos=rng.random() < 0.3,
                stop_token_ids=[rng.randrange(50)] if rng.random() < 0.3 else None,
                min_tokens=1,
            )
        )
    behind, _, _ = run_all(settings, requests)
    ahead, scheduler, plans = run_all(settings, requests, ahead=True)
    assert ahead == behind
    assert any(row.source >= 0 for plan in plans for row in plan.rows)
    assert scheduler.stats().blocks_used == 0


def test_a_row_that_had_ended_is_dropped_and_its_blocks_come_back() -> None:
    scheduler = Scheduler(config())
    device = SimulatedDevice(scheduler)
    scheduler.add(request("r", [1, 2, 3], max_tokens=9, stop_token_ids=list(range(50))))
    first = scheduler.schedule()
    assert first is not None
    issued = device.issue(first)
    second = scheduler.schedule_ahead()
    assert second is not None
    assert second.rows[0].source == 0
    also = device.issue(second)
    assert first.rows[0] == PlanRow(*first.rows[0])  # made without checks: all fields are there
    (event,) = scheduler.commit(first, device.execute(issued))
    assert event == TokenEvent(*event)
    assert len(event) == len(TokenEvent._fields)
    assert event.finish_reason == "stop"
    assert scheduler.has_work()  # until the step that runs for nothing is back
    scheduler.check_integrity()
    assert scheduler.stats().blocks_used > 0
    assert scheduler.commit(second, device.execute(also)) == []
    assert scheduler.stats().blocks_used == 0
    assert not scheduler.has_work()


def test_nothing_is_planned_ahead_of_answers_that_begin_together() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("r", [1, 2, 3], max_tokens=9, n=2))
    assert scheduler.schedule() is not None
    assert scheduler.schedule_ahead() is None


def test_an_answer_that_ends_by_its_length_wastes_no_row() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("r", [1, 2, 3], max_tokens=1))
    assert scheduler.schedule() is not None
    assert scheduler.schedule_ahead() is None


@pytest.mark.parametrize("ahead", [0.0, 0.7])
@pytest.mark.parametrize("policy", ["swap", "recompute"])
def test_fuzz_while_memory_runs_out(policy: str, ahead: float) -> None:
    """Steps fail before their moves or half-way; their rows wait again, and no answer is wrong."""
    fuzzer = Fuzzer(
        config(
            **TINY,
            max_batched_tokens=9,
            num_host_blocks=6,
            preemption=policy,
            cost=PreemptionCost(1, 1.0, 4.0),
        ),
        seed=len(policy),
        ahead=ahead,
        faults=0.04,
    )
    for _ in range(1500):
        fuzzer.step()
    fuzzer.drain()
    assert fuzzer.scheduler.limits.num_failures > 30
    assert sum(how == "finished" for how in fuzzer.ended.values()) > 10


def test_steps_shrink_when_memory_runs_out_and_slowly_grow_again() -> None:
    limits = StepLimits(max_rows=64, max_tokens=512)
    assert limits.shrink(num_rows=40, num_tokens=400)
    assert (limits.num_rows, limits.num_tokens) == (20, 200)
    assert limits.shrink(num_rows=1, num_tokens=9)
    assert (limits.num_rows, limits.num_tokens) == (1, 4)
    assert not limits.shrink(num_rows=1, num_tokens=1)  # that row alone is to blame
    assert (limits.num_rows, limits.num_tokens) == (64, 512)
    limits.shrink(num_rows=64, num_tokens=64)
    steps = 0
    while (limits.num_rows, limits.num_tokens) != (64, 512):
        before = limits.num_rows
        limits.grow()
        assert before <= limits.num_rows <= before + before // 8 + 1
        steps += 1
        assert limits.num_tokens >= limits.num_rows
    assert steps > 500
    assert limits.num_failures == 4


def test_fuzz_without_prefix_cache() -> None:
    fuzzer = Fuzzer(config(**TINY, prefix_cache=False, num_host_blocks=20), seed=5)
    for _ in range(600):
        fuzzer.step()
    fuzzer.drain()
    assert fuzzer.scheduler.stats().counters.prefix_hits == 0


def crowd(**params: object) -> list:
    return [
        request(
            f"r{i}",
            [i + 1, *range(1, 9), i + 2],
            arrival=float(i),
            max_tokens=20,
            ignore_eos=True,
            **params,
        )
        for i in range(6)
    ]


@pytest.mark.parametrize(("policy", "host_blocks"), [("swap", 40), ("recompute", 0), ("auto", 9)])
def test_preempted_answers_equal_undisturbed_ones(policy: str, host_blocks: int) -> None:
    calm, _, _ = run_all(config(), crowd())
    tight = config(**TINY, preemption=policy, num_host_blocks=host_blocks)
    pressed, scheduler, _ = run_all(tight, crowd())
    stats = scheduler.stats()
    assert stats.preemptions_swap + stats.preemptions_recompute > 0
    assert pressed == calm


def test_prefix_cache_on_equals_off() -> None:
    prompts = [request(f"r{i}", [*range(1, 21), i + 1], arrival=i, max_tokens=6) for i in range(5)]
    on, scheduler, _ = run_all(config(), prompts)
    off, _, _ = run_all(config(prefix_cache=False), prompts)
    assert on == off
    assert scheduler.stats().counters.prefix_hits == 4 * 20


def test_a_shared_prefix_is_computed_once_even_when_all_come_together() -> None:
    prompts = [request(f"r{i}", [*range(1, 33), 40 + i], max_tokens=2) for i in range(6)]
    _, _, plans = run_all(config(), prompts)
    prompt_tokens = sum(row.num_tokens for plan in plans for row in plan.rows if row.start < 33)
    assert prompt_tokens == 33 + 5  # the whole prompt once, then each one's last token


@pytest.mark.parametrize("budget", [16, 64])
def test_who_comes_together_shares_what_this_very_step_computes(budget: int) -> None:
    prompts = [request(f"r{i}", [*range(1, 33), 40 + i], max_tokens=2) for i in range(6)]
    answers, _, plans = run_all(config(max_batched_tokens=budget), prompts)
    alone, _, _ = run_all(config(prefix_cache=False), prompts)
    assert answers == alone
    counts = [[row.num_tokens for row in plan.rows] for plan in plans]
    if budget == 64:
        assert counts[0] == [33, 1, 1, 1, 1, 1]
    else:  # they wait while parts of it are computed, and begin in the step that ends it
        assert counts[:3] == [[16], [16], [1, 1, 1, 1, 1, 1]]


def test_salts_keep_prefixes_apart() -> None:
    prompts = [request(f"r{i}", list(range(1, 22)), salt=f"t{i}", max_tokens=2) for i in range(2)]
    _, scheduler, _ = run_all(config(), prompts)
    assert scheduler.stats().counters.prefix_hits == 0


def test_an_evicted_prefix_comes_back_from_the_host_tier() -> None:
    first = request("a", list(range(1, 18)), max_tokens=2)
    others = [request(f"o{i}", [20 + i] * 33, arrival=1 + i, max_tokens=2) for i in range(3)]
    again = request("b", list(range(1, 18)), arrival=9, max_tokens=2)
    answers, scheduler, _ = run_all(config(**TINY, num_host_blocks=40), [first, *others, again])
    counters = scheduler.stats().counters
    assert counters.evictions_demoted > 0
    assert counters.blocks_swapped_in == 4
    assert answers[("a", 0)] == answers[("b", 0)]


def test_forks_share_the_prompt_and_copy_on_write() -> None:
    prompt = list(range(1, 11))  # two full blocks and a partial one
    answers, scheduler, plans = run_all(
        config(), [request("r", prompt, n=3, max_tokens=5, ignore_eos=True)]
    )
    assert sorted(answers) == [("r", 0), ("r", 1), ("r", 2)]
    assert scheduler.stats().counters.blocks_copied == 2  # the last holder writes in place
    assert plans[0].rows[0].num_samples == 3
    assert sum(row.num_tokens for row in plans[0].rows) == len(prompt)
    assert len({tuple(tokens) for tokens in answers.values()}) == 3


def test_copies_of_one_request_equal_the_single_one() -> None:
    single, _, _ = run_all(config(), [request("r", list(range(1, 14)), max_tokens=9)])
    many, _, _ = run_all(
        config(), [request(f"r{i}", list(range(1, 14)), max_tokens=9) for i in range(7)]
    )
    assert {tuple(tokens) for tokens in many.values()} == {tuple(single[("r", 0)])}


def test_long_prompts_are_chunked_and_do_not_stall_answers() -> None:
    scheduler = Scheduler(config(max_batched_tokens=10))
    device = SimulatedDevice(scheduler)
    scheduler.add(request("short", [1, 2], max_tokens=30, ignore_eos=True))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, device.run(plan))
    scheduler.add(request("long", list(range(1, 41)), arrival=1.0, max_tokens=2))
    for _ in range(4):
        plan = scheduler.schedule()
        assert plan is not None
        assert {row.sequence.request.request_id for row in plan.rows} == {"short", "long"}
        assert plan.num_tokens == 10
        scheduler.commit(plan, device.run(plan))


def test_priority_goes_first() -> None:
    requests = [
        request("late", [1, 2, 3], arrival=0.0, priority=1, max_tokens=1),
        request("first", [4, 5, 6], arrival=1.0, priority=0, max_tokens=1),
    ]
    _, _, plans = run_all(config(max_num_sequences=1), requests)
    names = [plan.rows[0].sequence.request.request_id for plan in plans]
    assert names == ["first", "late"]


def test_prompt_logprobs_cover_every_position_but_the_first() -> None:
    scheduler = Scheduler(config(max_batched_tokens=8))
    device = SimulatedDevice(scheduler)
    prompt = list(range(1, 31))
    for name in ("a", "b"):  # the second finds the prefix cached, but must not use it
        scheduler.add(request(name, prompt, max_tokens=2, prompt_logprobs=0, ignore_eos=True))
        events = []
        while scheduler.has_work():
            plan = scheduler.schedule()
            assert plan is not None
            events += scheduler.commit(plan, device.run(plan))
        assert [t.token_id for t in events[0].prompt_logprobs or ()] == prompt[1:]
        assert events[1].prompt_logprobs is None


def test_finish_reasons() -> None:
    prompt = list(range(1, 9))
    free, _, _ = run_all(config(), [request("r", prompt, max_tokens=12, ignore_eos=True)])
    tokens = free[("r", 0)]
    stop = tokens[4]
    first = tokens.index(stop) + 1
    scheduler = Scheduler(config())
    device = SimulatedDevice(scheduler)
    scheduler.add(request("r", prompt, max_tokens=12, ignore_eos=True, stop_token_ids=[stop]))
    events = []
    while scheduler.has_work():
        plan = scheduler.schedule()
        assert plan is not None
        events += scheduler.commit(plan, device.run(plan))
    assert len(events) == first
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", stop)
    assert len(tokens) == 12


def test_abort_in_flight_frees_at_commit() -> None:
    scheduler = Scheduler(config())
    device = SimulatedDevice(scheduler)
    scheduler.add(request("r", list(range(1, 9)), n=2, max_tokens=5))
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduler.abort("r")
    scheduler.check_integrity()
    assert scheduler.stats().blocks_used == 2  # still being written
    assert scheduler.commit(plan, device.run(plan)) == []
    assert scheduler.stats().blocks_used == 0
    assert not scheduler.has_work()


def test_the_cost_model_decides() -> None:
    cheap_link = PreemptionCost(
        bytes_per_block=1, link_bytes_per_second=1e9, prefill_tokens_per_second=1
    )
    slow_link = PreemptionCost(
        bytes_per_block=1 << 30, link_bytes_per_second=1, prefill_tokens_per_second=1e9
    )
    for cost, kind in ((cheap_link, "swap"), (slow_link, "recompute")):
        _, scheduler, _ = run_all(config(**TINY, num_host_blocks=40, cost=cost), crowd())
        stats = scheduler.stats()
        swaps, recomputes = stats.preemptions_swap, stats.preemptions_recompute
        assert (swaps > 0, recomputes > 0) == (kind == "swap", kind == "recompute")


def test_reset_gives_everything_up() -> None:
    """After a step that broke off, wherever it did."""
    scheduler = Scheduler(config(**TINY, num_host_blocks=12, preemption="swap"))
    device = SimulatedDevice(scheduler)
    for item in crowd(n=2):
        scheduler.add(item)
    for _ in range(12):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, device.run(plan))
    assert scheduler.stats().preemptions_swap > 0
    before = scheduler.stats().counters
    assert scheduler.schedule() is not None  # never committed
    scheduler.reset()
    scheduler.check_integrity()
    stats = scheduler.stats()
    assert not scheduler.has_work()
    assert (stats.blocks_used, stats.blocks_cached) == (0, 0)
    assert (stats.host_blocks_used, stats.host_blocks_cached) == (0, 0)
    assert stats.counters.blocks_swapped_out >= before.blocks_swapped_out > 0
    scheduler.add(crowd()[0])  # the id is free again
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.rows[0].start == 0
    assert scheduler.abort("r0")
    scheduler.commit(plan, device.run(plan))
    scheduler.check_integrity()
