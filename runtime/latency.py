"""Measures the steps of one batch shape: so many sequences at so many tokens, all decoding."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from halyard.hal.errors import ConfigError
from halyard.runtime.limits import DeviceLimits
from halyard.runtime.request import SamplingParams
from halyard.runtime.work import watched_plans, work_of

if TYPE_CHECKING:
    from halyard.runtime.llm import LLM
    from halyard.runtime.plan import StepPlan

__all__ = ["StepTimes", "measure_steps", "percentiles"]

_WARM_STEPS = 8


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of each decode step, between one step's tokens and the next one's."""

    rows: int
    context: int  # tokens of each prompt
    seconds: tuple[float, ...]
    least_seconds: float | None  # of such a step at the device's limits; None: not asked for


def percentiles(values: list[float] | tuple[float, ...]) -> dict[str, float]:
    """mean, p50, p90, p95, p99 and max; of nothing: empty."""
    if not values:
        return {}
    at = np.percentile(values, (50, 90, 95, 99)).tolist()
    names = ("p50", "p90", "p95", "p99")
    return {"mean": float(np.mean(values)), **dict(zip(names, at, strict=True)),
            "max": float(max(values))}  # fmt: skip


def measure_steps(
    llm: LLM, rows: int, context: int, steps: int, limits: DeviceLimits | None = None
) -> StepTimes:
    """Fill a batch, then time `steps` steps in which all its rows decode.

    Raises:
        ConfigError: such a batch doesn't fit in the engine.
    """
    engine, memory = llm.engine, llm.plan.memory
    total = steps + _WARM_STEPS + 4
    if min(rows, context, steps) < 1:
        raise ConfigError("batch, context and steps must be at least 1")
    if rows > engine.scheduler.config.max_num_sequences:
        raise ConfigError(f"a batch of {rows} needs --max-num-sequences {rows} or more")
    blocks = -(-(context + total) // engine.scheduler.config.block_size)
    if context + total > memory.max_model_len or rows * blocks > memory.num_blocks:
        raise ConfigError(
            f"{rows} sequences of {context + total} tokens need {rows * blocks} KV blocks and a "
            f"context that long; here are {memory.num_blocks} blocks and {memory.max_model_len} "
            "tokens: lower --context, --steps or --batch, or raise --kv-blocks"
        )
    generator = np.random.RandomState(0)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=total)
    names = []
    for _ in range(rows):
        prompt = generator.randint(0, llm.plan.spec.vocab_size, context).tolist()
        request = engine.intake.request(prompt, params)
        names.append(request.request_id)
        engine.add(request)
    seconds: list[float] = []
    plans: list[StepPlan] = []

    def note(plan: StepPlan) -> None:
        if plan.num_tokens == rows == len(plan.rows):
            plans[:] = [plan]

    decoding = 0
    try:
        with watched_plans(llm, note):
            before = time.perf_counter()
            while len(seconds) < steps and engine.has_work():
                events = engine.step()
                now = time.perf_counter()
                if len(events) == rows:
                    decoding += 1
                    if decoding > _WARM_STEPS:
                        seconds.append(now - before)
                before = now
        least = None
        if limits is not None and plans:
            least = limits.least_seconds(work_of(plans[0], llm))
    finally:
        for name in names:
            engine.abort(name)
        while engine.has_work():
            engine.step()
    return StepTimes(rows, context, tuple(seconds), least)
