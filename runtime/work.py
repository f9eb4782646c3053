"""What a step asks of a device: the bytes it must move and the arithmetic it must do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halyard.hal.types import ITEM_SIZE

if TYPE_CHECKING:
    from halyard.runtime.executor import PreparedStep
    from halyard.runtime.llm import LLM
    from halyard.runtime.plan import StepPlan

__all__ = ["Work", "watched_plans", "work_of"]


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes and arithmetic: weights read once a step, each row's keys and values."""

    bytes: float
    flops: float


def work_of(step: StepPlan, llm: LLM) -> Work:
    """What a step must read, write and compute.

    Weights count once a step as they are held, but an input embedding that isn't tied counts by the
    rows that are looked up; every row's keys and values are read once and the new ones written.
    Which experts tokens choose isn't known: as many count as an even choice reaches.
    """
    plan, executor = llm.plan, llm.engine.executor
    spec, kv_bytes = (
        plan.spec,
        executor.pool.layout.spec.bytes_per_token,
    )  # of a token in all layers
    width = spec.num_heads * spec.head_dim
    keys = met = 0.0  # as many of all layers
    for window, layers in Counter(spec.windows).items():
        for row in step.rows:
            inside = min(row.start, max(0, window - 1)) if window else row.start
            keys += layers * (inside + row.num_tokens)
            met += layers * _met(row.start, row.end, window)
    embedding = spec.vocab_size * spec.hidden_size
    read = executor.program.weight_bytes
    if not spec.tied:
        read -= embedding * ITEM_SIZE[plan.dtype]
    matrices = max(0, plan.num_parameters - embedding * (1 if spec.tied else 2))
    experts = 3 * spec.hidden_size * spec.expert_size * spec.num_experts * spec.num_layers
    experts = min(experts, matrices) if spec.num_experts > 1 else 0
    chosen = min(1.0, spec.experts_per_token / spec.num_experts)
    unread = experts * ITEM_SIZE[plan.dtype] * (1.0 - chosen) ** step.num_tokens
    active = matrices - experts * (1.0 - chosen)
    return Work(
        bytes=max(read - unread, 0.0) + kv_bytes * (keys / spec.num_layers + step.num_tokens),
        flops=2.0 * active * step.num_tokens
        + 2.0 * embedding * step.num_samples
        + 4.0 * width * met,
    )


def _met(start: int, end: int, window: int) -> float:
    """Keys that the tokens from `start` to `end` meet: one at position p, itself and p before it, or as
    many as the window holds."""
    if not window:
        return (end - start) * (start + end + 1) / 2
    grows = min(max(window, start), end)  # from there on the window is full
    return (grows - start) * (start + grows + 1) / 2 + (end - grows) * float(window)


@contextmanager
def watched_plans(llm: LLM, look: Callable[[StepPlan], None]) -> Iterator[None]:
    """Show every step that runs inside to `look` before it is prepared."""
    executor = llm.engine.executor
    prepare = executor.prepare

    def watched(plan: StepPlan) -> PreparedStep:
        look(plan)
        return prepare(plan)

    executor.prepare = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        executor.prepare = prepare  # type: ignore[method-assign]
