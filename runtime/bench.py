"""Measures throughput: a workload, all requests at once, greedy, answers of full length."""

from __future__ import annotations

import itertools
import platform
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from halyard.hal.errors import ConfigError, HalyardError
from halyard.runtime.limits import DeviceLimits
from halyard.runtime.request import SamplingParams
from halyard.runtime.work import watched_plans, work_of

if TYPE_CHECKING:
    from halyard.runtime.engine import EngineStats
    from halyard.runtime.llm import LLM
    from halyard.runtime.plan import StepPlan
    from halyard.runtime.workloads import Workload

__all__ = ["Measurement", "measure_throughput", "peak_rss_bytes", "report"]

_runs = itertools.count()


@dataclass(frozen=True, slots=True)
class Measurement:
    """All runs of a workload on one engine; counts are those of the fastest run."""

    workload: Workload
    seconds: tuple[float, ...]  # one a run, in the order they ran
    output_tokens: int
    steps: int
    computed_prompt_tokens: int  # prompt tokens that the prefix cache didn't save
    preemptions: int
    prefix_hit_rate: float  # prompt tokens found in the prefix cache, as a share of those looked up
    kv_waste_fraction: float  # average since the engine started, warm-up included
    least_seconds: float | None = None  # of the same steps at the device's limits; None: not asked

    @property
    def best_seconds(self) -> float:
        return min(self.seconds)


def measure_throughput(
    llm: LLM,
    workload: Workload,
    repeat: int = 1,
    warmup: int = 0,
    limits: DeviceLimits | None = None,
) -> Measurement:
    """Run the workload `warmup` times unmeasured, then `repeat` times.

    Prefixes cached by one run must not help the next: each run of a process has prompts of its own,
    made by adding a constant to every token, so lengths and what is shared within a run stay the same.

    With `limits` every step's bytes and arithmetic are counted, by what the scheduler planned.

    Raises:
        ConfigError: a request doesn't fit in the engine's context.
        HalyardError: an answer has not the length it should have.
    """
    if repeat < 1 or warmup < 0:
        raise ConfigError(f"repeat must be at least 1 and warmup 0, got {repeat} and {warmup}")
    context = llm.engine.intake.limits.max_model_len
    if workload.longest > context:
        raise ConfigError(
            f"workload {workload.name} has a request of {workload.longest} tokens, but the context "
            f"holds {context}: raise --max-model-len or --kv-blocks"
        )
    for _ in range(warmup):
        _run(llm, workload)
    runs = [_measured(llm, workload, limits) for _ in range(repeat)]
    seconds = tuple(elapsed for elapsed, _, _ in runs)
    _, gained, least = min(runs, key=lambda one: one[0])
    queries = gained["prefix_queries"]
    return Measurement(
        workload=workload,
        seconds=seconds,
        output_tokens=workload.answer_tokens,
        steps=gained["steps"],
        computed_prompt_tokens=gained["prompt_tokens"],
        preemptions=gained["preemptions"],
        prefix_hit_rate=gained["prefix_hits"] / queries if queries else 0.0,
        kv_waste_fraction=llm.engine.stats().scheduler.kv_waste,
        least_seconds=least if limits is not None else None,
    )


def _measured(
    llm: LLM, workload: Workload, limits: DeviceLimits | None
) -> tuple[float, dict[str, int], float]:
    """Seconds of one run, by how much it raised the engine's totals, seconds at the limits."""
    before = _totals(llm.engine.stats())
    least = 0.0

    def count(plan: StepPlan) -> None:
        nonlocal least
        if limits is not None:
            least += limits.least_seconds(work_of(plan, llm))

    with watched_plans(llm, count) if limits is not None else nullcontext():
        elapsed = _run(llm, workload)
    after = _totals(llm.engine.stats())
    return elapsed, {name: after[name] - before[name] for name in after}, least


def _run(llm: LLM, workload: Workload) -> float:
    """Seconds from the first submission to the last token."""
    run = next(_runs)
    vocab_size = llm.engine.intake.limits.vocab_size
    prompts = [
        {"prompt_token_ids": [(token + run) % vocab_size for token in one.prompt_token_ids]}
        for one in workload.requests
    ]
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=one.max_tokens)
        for one in workload.requests
    ]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - started
    for output, one in zip(outputs, workload.requests, strict=True):
        length = len(output.outputs[0].token_ids)
        if length != one.max_tokens:
            raise HalyardError(
                f"{output.request_id} answered {length} tokens instead of {one.max_tokens}: "
                "the measurement would be wrong"
            )
    return elapsed


def _totals(stats: EngineStats) -> dict[str, int]:
    """Running totals whose rise is what one run did."""
    scheduler = stats.scheduler
    return {
        "steps": stats.steps,
        "prompt_tokens": stats.prompt_tokens,
        "prefix_queries": scheduler.counters.prefix_queries,
        "prefix_hits": scheduler.counters.prefix_hits,
        "preemptions": scheduler.preemptions_swap + scheduler.preemptions_recompute,
    }


def report(llm: LLM, measured: Measurement) -> dict[str, Any]:
    """The measurement as plain data; rates are those of the fastest run."""
    workload, best, plan = measured.workload, measured.best_seconds, llm.plan
    bound: dict[str, Any] = {}
    if measured.least_seconds is not None:
        bound = {
            "limit_seconds": measured.least_seconds,
            "fraction_of_limit": measured.least_seconds / best,
        }
    return bound | {
        "engine": "halyard",
        "backend": plan.selection.row.name,
        "requests": len(workload.requests),
        "seconds": best,
        "output_tokens_per_second": measured.output_tokens / best,
        "total_tokens_per_second": (workload.prompt_tokens + measured.output_tokens) / best,
        "startup_seconds": llm.startup_seconds,
        "startup_phases": llm.facts.start_seconds,
        "model": plan.spec.name,
        "dtype": plan.dtype,
        "workload": workload.name,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": measured.output_tokens,
        "all_seconds": list(measured.seconds),
        "steps": measured.steps,
        "computed_prompt_tokens": measured.computed_prompt_tokens,
        "prefix_hit_rate": measured.prefix_hit_rate,
        "kv_waste_fraction": measured.kv_waste_fraction,
        "preemptions": measured.preemptions,
        "kv_blocks": plan.memory.num_blocks,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": llm.engine.executor.device.info.name,
        "versions": _versions(),
    }


def peak_rss_bytes() -> int:
    """Most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("halyard", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that isn't installed
            found[package] = "not installed"
    return found
