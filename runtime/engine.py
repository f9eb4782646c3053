"""One model on one backend: schedule, run, commit. Single-threaded; clients bring the threads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from halyard.hal import fallbacks
from halyard.runtime.picture import EnginePicture, take_picture
from halyard.runtime.plan import StepOutput, StepPlan, TokenEvent
from halyard.runtime.request import Request

if TYPE_CHECKING:
    from halyard.runtime.executor import Executor
    from halyard.runtime.handoff import MovingSequence
    from halyard.runtime.intake import Intake
    from halyard.runtime.metrics import Metrics
    from halyard.runtime.scheduler import Scheduler
    from halyard.runtime.stats import SchedulerStats

__all__ = ["Engine", "EngineStats"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment."""

    scheduler: SchedulerStats
    steps: int  # run so far
    prompt_tokens: int  # computed so far (cached ones are not computed)
    generated_tokens: int  # sampled so far
    busy_seconds: float  # spent in steps
    uptime_seconds: float
    phase_seconds: dict[str, float] = field(default_factory=dict)  # of steps, by what they did
    swap_out_seconds: float = 0.0  # of phase "run", on moves to the host tier
    swap_in_seconds: float = 0.0
    fallbacks: dict[str, int] = field(default_factory=dict)  # part -> slower ways taken


class Engine:
    """Requests in, token events out, one step at a time.

    Not thread-safe, with one exception: `stats()` and `num_waiting` may be read from anywhere.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        intake: Intake,
        metrics: Metrics,
        max_queue_len: int | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.intake = intake
        self.metrics = metrics
        self.max_queue_len = max_queue_len  # most requests that wait; None: no limit
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._busy_seconds = 0.0
        self._phases = dict.fromkeys(("schedule", "run", "wait", "commit"), 0.0)
        self._started = time.monotonic()
        self._closed = False

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Give up a request, or one of its answers. No event follows. False if it isn't known."""
        return self.scheduler.abort(request_id, index)

    def detach(self, request_id: str) -> MovingSequence:
        """Stop a running request and take it out, with its KV, for another engine to go on with.

        No event follows. The sequence may go to any engine of the same model: another backend,
        another block size.

        Raises:
            RequestError: it isn't here, or has several answers.
        """
        from halyard.runtime.handoff import take

        return take(self.scheduler, self.executor, request_id)

    def attach(self, moving: MovingSequence) -> bool:
        """Go on with a detached request. False: no room for its KV now, so it is computed again."""
        from halyard.runtime.handoff import give

        return give(self.scheduler, self.executor, moving)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> list[TokenEvent]:
        """Run one step. Empty if there was nothing to run.

        If it breaks off (Ctrl-C, a failing device), all requests are given up before the exception
        goes on: the engine has no work then and, if its device has not died, can be used again.
        """
        try:
            return self._step()
        except BaseException:
            self.scheduler.reset()
            raise

    def _step(self) -> list[TokenEvent]:
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        planned = time.perf_counter()
        result = self.executor.run(plan)
        issued = time.perf_counter()
        output = result.wait()
        computed = time.perf_counter()
        events = self._fail_bad_rows(plan, output)
        events += self.scheduler.commit(plan, output)
        ended = time.perf_counter()
        phases = self._phases
        phases["schedule"] += planned - started
        phases["run"] += issued - planned
        phases["wait"] += computed - issued
        phases["commit"] += ended - computed
        self._count(plan, output, ended - started)
        return events

    def stats(self) -> EngineStats:
        return EngineStats(
            scheduler=self.scheduler.stats(),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            busy_seconds=self._busy_seconds,
            uptime_seconds=time.monotonic() - self._started,
            phase_seconds=dict(self._phases),
            swap_out_seconds=self.executor.swap_out_seconds,
            swap_in_seconds=self.executor.swap_in_seconds,
            fallbacks=fallbacks.counts(),
        )

    def picture(self) -> EnginePicture:
        """Its blocks and sequences. Between two steps, from the thread that runs them."""
        return take_picture(self.scheduler)

    def check_integrity(self) -> None:
        """Raise if an invariant of the block accounting is broken."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        """Free the device. Idempotent."""
        if not self._closed:
            self._closed = True
            self.executor.close()

    def _fail_bad_rows(self, plan: StepPlan, output: StepOutput) -> list[TokenEvent]:
        """End requests whose logits were not numbers; the others go on."""
        events = []
        for row_index, error in output.errors:
            request = plan.rows[row_index].sequence.request
            if self.scheduler.abort(request.request_id):
                events += [
                    TokenEvent(request.request_id, index, finish_reason="error", error=error)
                    for index in range(request.params.n)
                ]
        return events

    def _count(self, plan: StepPlan, output: StepOutput, seconds: float) -> None:
        sampled = sum(map(len, output.token_ids))
        self._steps += 1
        self._generated_tokens += sampled
        self._prompt_tokens += sum(
            max(0, min(row.end, row.sequence.num_prompt_tokens) - row.start) for row in plan.rows
        )
        self._busy_seconds += seconds
        self.metrics.observe_step(len(plan.rows), plan.num_tokens, seconds)
