"""What the host costs a step, without running the plan: the scheduler, then all of the host's work.

PYTHONPATH=pkg python benchmarks/scheduler.py [--rows 1 16 64 256] [--context 1024] [--steps 200]

The bar: schedule, pack, prepare (the sampler's part before there are logits), output (tokens brought
into a plan's rows) and commit under 1.0 ms a step in all, at 256 sequences that decode.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from halyard.runtime.batcher import Batcher
from halyard.runtime.config import SchedulerConfig
from halyard.runtime.executor import RunningStep
from halyard.runtime.plan import StepOutput, StepPlan
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.sampler import Sampler
from halyard.runtime.scheduler import Scheduler

BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=200, help="decode steps that are timed")
    args = parser.parse_args()
    print(f"{'case':<34} {'schedule':>9} {'commit':>8} {'step':>8} {'p99':>8}  (ms; median)")
    for rows in args.rows:
        _report(f"decode, {rows} rows", decode(rows, args.context, args.steps))
    print(f"{'all of it':<26} {'schedule':>9} {'pack':>7} {'prepare':>8} {'output':>7} {'commit':>7}"
          f" {'sum':>7} {'p99':>7}  (ms; median)")  # fmt: skip
    for rows in args.rows:
        for name, params in KINDS.items():
            host_work(f"{name}, {rows} rows", rows, args.context, args.steps, params)
    _report("prefix, 256 at once, 2048 shared", shared_prefix(256, 2048))
    for policy in ("swap", "recompute"):
        _report(f"pressure by {policy}, 64 wanted", pressure(policy))
    steps, seconds = fuzz(20_000)
    print(f"fuzz on a tiny pool: {steps / seconds:,.0f} steps a second")


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}


def host_work(
    name: str, rows: int, context: int, steps: int, params: dict[str, Any], vocab: int = 32000
) -> None:
    """Everything that the host does for decode steps, timed part by part."""
    scheduler = _decoding(rows, context, steps, params)
    batcher = Batcher(BLOCK_SIZE, -(-(context + steps + BLOCK_SIZE) // BLOCK_SIZE))
    sampler = Sampler(vocab)
    times: list[list[float]] = []
    gc.collect()
    while scheduler.has_work() and len(times) < steps:
        marks = [time.perf_counter()]
        plan = scheduler.schedule()
        if plan is None:
            break
        marks.append(time.perf_counter())
        packed = batcher.pack(plan)
        marks.append(time.perf_counter())
        sampler.prepare(packed.samples)
        marks.append(time.perf_counter())
        codes = _Codes(torch.full((len(packed.samples),), 14))
        running = RunningStep(plan, None, codes, [], [], {}, {}, (), None)
        marks.append(time.perf_counter())
        output = running.wait()
        marks.append(time.perf_counter())
        scheduler.commit(plan, output)
        marks.append(time.perf_counter())
        if plan.num_tokens == rows == len(plan.rows):
            parts = [b - a for a, b in itertools.pairwise(marks)]
            times.append([*parts[:3], *parts[4:]])
    columns = [sorted(column)[len(times) // 2] * 1e3 for column in zip(*times, strict=True)]
    sums = sorted(map(sum, times))
    print(
        f"{name:<26} {columns[0]:>9.3f} {columns[1]:>7.3f} {columns[2]:>8.3f} {columns[3]:>7.3f} "
        f"{columns[4]:>7.3f} {sums[len(sums) // 2] * 1e3:>7.3f} "
        f"{sums[int(len(sums) * 0.99)] * 1e3:>7.3f}",
        flush=True,
    )


class _Codes:
    """What a device would have drawn."""

    def __init__(self, codes: torch.Tensor) -> None:
        self._codes = codes

    def ready(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self._codes


Times = list[tuple[float, float]]  # seconds of schedule and of commit, a step each


def decode(rows: int, context: int, steps: int) -> Times:
    """`rows` sequences with unrelated prompts that all decode; one token each a step."""
    scheduler = _decoding(rows, context, steps, {})
    times = _run(scheduler, until=lambda plan: plan.num_tokens == rows == len(plan.rows))
    del times[:]  # reading the prompts
    return _run(scheduler, until=lambda plan: plan.step > 0, at_least=steps)


def _decoding(rows: int, context: int, steps: int, params: dict[str, Any]) -> Scheduler:
    length = context + steps + BLOCK_SIZE
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=rows * -(-length // BLOCK_SIZE),
            max_model_len=length,
            block_size=BLOCK_SIZE,
            max_num_sequences=rows,
            max_batched_tokens=max(8192, rows),
        )
    )
    rng = random.Random(0)
    for number in range(rows):
        prompt = tuple(rng.randrange(1, 32000) for _ in range(context))
        scheduler.add(_request(number, prompt, steps + BLOCK_SIZE, params))
    return scheduler


def shared_prefix(requests: int, shared: int) -> Times:
    """Requests that arrive at once and share a long prefix, from the first step to the last."""
    length = shared + 64
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=shared // BLOCK_SIZE + requests * 4,
            max_model_len=length,
            block_size=BLOCK_SIZE,
            max_num_sequences=requests,
            max_batched_tokens=2048,
        )
    )
    prefix = tuple(range(1, shared + 1))
    for number in range(requests):
        own = (1 + number, *range(1, 16))
        scheduler.add(_request(number, prefix + own, 16))
    return _run(scheduler)


def pressure(policy: str) -> Times:
    """Twice as many sequences as the blocks hold, with a host tier that holds the rest."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=512,
            max_model_len=512,
            block_size=BLOCK_SIZE,
            num_host_blocks=1024,
            max_num_sequences=64,
            preemption=policy,  # type: ignore[arg-type]
        )
    )
    rng = random.Random(0)
    for number in range(64):
        prompt = tuple(rng.randrange(1, 32000) for _ in range(64))
        scheduler.add(_request(number, prompt, 200))
    return _run(scheduler)


def fuzz(steps: int) -> tuple[int, float]:
    """Random traffic on 12 blocks of 4 tokens; arrivals and aborts are part of the time."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=12,
            max_model_len=40,
            block_size=4,
            num_host_blocks=12,
            max_num_sequences=5,
            max_batched_tokens=9,
        )
    )
    rng = random.Random(0)
    number = 0
    started = time.perf_counter()
    for _ in range(steps):
        if rng.random() < 0.25 and scheduler.num_waiting < 20:
            number += 1
            prompt = tuple(rng.randrange(1, 4) for _ in range(rng.randrange(1, 20)))
            scheduler.add(_request(number, prompt, rng.randrange(1, 20)))
        if rng.random() < 0.02:
            scheduler.abort(str(rng.randrange(max(1, number - 10), number + 2)))
        plan = scheduler.schedule()
        if plan is not None:
            scheduler.commit(plan, _output(plan))
    return steps, time.perf_counter() - started


def _request(
    number: int, prompt: tuple[int, ...], max_tokens: int, options: dict[str, Any] | None = None
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **(options or {}))
    return Request(str(number), prompt, params, max_tokens, arrival_time=float(number))


def _output(plan: StepPlan) -> StepOutput:
    """Some tokens; computing them is not what is measured."""
    nothing = (None,) * len(plan.rows)
    tokens = tuple((7,) * row.num_samples for row in plan.rows)
    return StepOutput(tokens, nothing, nothing)


def _run(
    scheduler: Scheduler,
    until: Callable[[StepPlan], bool] = lambda plan: False,
    at_least: int = 0,
) -> Times:
    """Step until there is no work, or until `until` says so after `at_least` steps."""
    times: Times = []
    gc.collect()
    while scheduler.has_work():
        begun = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        if plan is None:
            break
        output = _output(plan)
        ready = time.perf_counter()
        scheduler.commit(plan, output)
        times.append((planned - begun, time.perf_counter() - ready))
        if len(times) >= at_least and until(plan):
            break
    return times


def _report(name: str, times: Times) -> None:
    def at(values: list[float], share: float) -> float:
        return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1e3

    schedule, commit = [a for a, _ in times], [b for _, b in times]
    whole = [a + b for a, b in times]
    print(
        f"{name:<34} {at(schedule, 0.5):>9.3f} {at(commit, 0.5):>8.3f} "
        f"{at(whole, 0.5):>8.3f} {at(whole, 0.99):>8.3f}  {len(times)} steps",
        flush=True,
    )


if __name__ == "__main__":
    main()
