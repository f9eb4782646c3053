"""One model on one backend: schedule, run, commit. Single-threaded; clients bring the threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from halyard.hal import fallbacks
from halyard.hal.errors import DeviceMemoryError, HalyardError
from halyard.runtime.picture import EnginePicture, take_picture
from halyard.runtime.plan import StepOutput, StepPlan, TokenEvent
from halyard.runtime.request import Request

if TYPE_CHECKING:
    from halyard.runtime.executor import Executor, PreparedStep
    from halyard.runtime.handoff import MovingSequence
    from halyard.runtime.intake import Intake
    from halyard.runtime.metrics import Metrics
    from halyard.runtime.rehearsal import Rehearsal
    from halyard.runtime.running import RunningStep
    from halyard.runtime.scheduler import Scheduler
    from halyard.runtime.stats import SchedulerStats

__all__ = ["ASLEEP", "OUT_OF_MEMORY", "Engine", "EngineStats"]

ASLEEP = "the engine sleeps"
OUT_OF_MEMORY = "the device's memory is too small for this request"

logger = logging.getLogger("halyard.engine")


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


@dataclass(frozen=True, slots=True)
class _Flying:
    """A step that was issued and is not committed."""

    plan: StepPlan
    prepared: PreparedStep
    running: RunningStep


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
        overlap: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.intake = intake
        self.metrics = metrics
        self.overlap = overlap and executor.overlaps  # issue a step before the last one is back
        self._clock = 0.0
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._busy_seconds = 0.0
        self._flying: _Flying | None = None
        self._shortage: DeviceMemoryError | None = None  # of a step that is to be taken back
        self._late: list[TokenEvent] = []  # of a step that was settled between two calls of step
        self._phases = dict.fromkeys(("schedule", "run", "wait", "commit"), 0.0)
        self._started = time.monotonic()
        self._rehearsal: Rehearsal | None = None
        self._closed = False
        self._asleep = False

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    def add(self, request: Request) -> None:
        params = request.params
        if request.guidance is not None and params.guided_finish and not params.ignore_eos:
            request.guidance.most = request.max_tokens  # known only now: the context may leave less
        self.scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Give up a request, or one of its answers. No event follows. False if it isn't known."""
        return self.scheduler.abort(request_id, index)

    def detach(self, request_id: str) -> MovingSequence:
        """Stop a running request and take it out, with its KV, for another engine to go on with.

        If a step was in flight, the next step() tells what it brought for the request; no other event
        follows. The sequence may go to any engine of the same model: another backend,
        another block size.

        Raises:
            RequestError: it isn't here, or has several answers.
        """
        from halyard.runtime.handoff import take

        self._settle()
        return take(self.scheduler, self.executor, request_id)

    def attach(self, moving: MovingSequence) -> bool:
        """Go on with a detached request. False: no room for its KV now, so it is computed again."""
        from halyard.runtime.handoff import give

        self._settle()
        return give(self.scheduler, self.executor, moving)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or bool(self._late)

    def step(self, meanwhile: Callable[[], None] | None = None) -> list[TokenEvent]:
        """Run one step: what it sampled. Empty if there was nothing to run.

        Where the device works while the host does something else, the step after it is issued first,
        so that the device has work while this one's results are taken in.

        If it breaks off (Ctrl-C, a failing device), all requests are given up before the exception
        goes on: the engine has no work then and, if its device has not died, can be used again.

        Args:
            meanwhile: is called while the device works, before the step after it is planned: it may
                add requests. Not where a step is done when it is issued.
        """
        try:
            return self._step(meanwhile)
        except BaseException:
            self._flying = self._shortage = None
            self.scheduler.reset()
            raise

    def rehearse(self) -> bool:
        """With no work: let go of what ran, and make one thing that steps to come will need (rehearsal.py).

        It takes some tens of milliseconds, or up to a few seconds while kernels are to be compiled.
        False: nothing is wanted now.
        """
        if self._asleep or self._flying is not None or self.has_work():
            return False
        self.executor.batcher.release()
        if self._rehearsal is None:
            from halyard.runtime.rehearsal import Rehearsal

            self._rehearsal = Rehearsal(self.executor, self.scheduler.config.max_batched_tokens)
        return self._rehearsal.one()

    def _step(self, meanwhile: Callable[[], None] | None) -> list[TokenEvent]:
        started = self._clock = time.perf_counter()
        events, self._late = self._late, []
        flying = self._flying or self._issue(self.scheduler.schedule())
        if flying is None:
            return events + self._retreat()
        self._flying = None
        if not self._draw(flying):
            return events + self._retreat()
        if self.overlap:
            if meanwhile is not None:
                meanwhile()
            self._flying = self._issue(self.scheduler.schedule_ahead(), flying.running)
        events += self._finish(flying) + self._retreat()
        self._busy_seconds += time.perf_counter() - started
        self.metrics.observe_step(
            len(flying.plan.rows), flying.plan.num_tokens, time.perf_counter() - started
        )
        return events

    def _issue(self, plan: StepPlan | None, before: RunningStep | None = None) -> _Flying | None:
        self._lap("schedule")
        if plan is None:
            return None
        try:
            flying = _Flying(plan, *self.executor.run(plan, before))
        except DeviceMemoryError as error:
            self._run_short(plan, error)
            return None
        self._lap("run")
        return flying

    def _draw(self, flying: _Flying) -> bool:
        """Have a step's tokens drawn, if they waited for those of the step before. False: no memory."""
        try:
            self.executor.draw(flying.prepared, flying.running)
        except DeviceMemoryError as error:
            self._run_short(flying.plan, error)
            return False
        self._lap("run")
        return True

    def _finish(self, flying: _Flying) -> list[TokenEvent]:
        """Wait for a step and take in what it computed."""
        plan = flying.plan
        if self._flying is not None:
            # A step that draws nothing doesn't say when it was done.
            self.executor.launched(plan.num_samples > 0 and flying.running.ready())
        try:
            output = flying.running.wait()
        except DeviceMemoryError as error:
            self._run_short(plan, error)
            return []
        self._lap("wait")
        events = self._fail_bad_rows(plan, output)
        events += self.scheduler.commit(plan, output)
        self._steps += 1
        self._generated_tokens += plan.num_samples
        self._prompt_tokens += plan.num_prompt_tokens
        self._lap("commit")
        return events

    def _settle(self) -> None:
        """Have no step in flight."""
        if self._flying is not None:
            flying, self._flying = self._flying, None
            if self._draw(flying):
                self._late += self._finish(flying)
            self._late += self._retreat()

    def _lap(self, phase: str) -> None:
        """The time since the last lap went to a phase."""
        now = time.perf_counter()
        self._phases[phase] += now - self._clock
        self._clock = now

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

    @property
    def asleep(self) -> bool:
        return self._asleep

    def sleep(self) -> None:
        """Free the device's memory: KV blocks go, weights move to the host. Nothing may run.

        Raises:
            HalyardError: requests are here.
        """
        if self.has_work():
            raise HalyardError("requests run: the engine can't sleep now")
        if not self._asleep:
            self._asleep = True
            self._rehearsal = None  # recordings go
            self.scheduler.reset()  # cached prefixes go with the blocks
            self.executor.sleep()

    def wake(self) -> None:
        """Take the memory again.

        Raises:
            CapacityError: somebody else has it; the engine sleeps on.
        """
        if self._asleep:
            self.executor.wake()
            self._asleep = False

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
            row = plan.rows[row_index]
            sequence, request = row.sequence, row.sequence.request
            if sequence.aborted:
                continue
            self.scheduler.kv.retract(sequence, row.start, row.end)
            if self.scheduler.abort(request.request_id):
                events += [
                    TokenEvent(request.request_id, index, finish_reason="error", error=error)
                    for index in range(request.params.n)
                ]
        return events

    def _run_short(self, plan: StepPlan, error: DeviceMemoryError) -> None:
        """A step did not fit; `_retreat` takes it back when no other is to be taken in before it."""
        logger.warning(
            "out of memory in a step of %d sequences and %d tokens: %s",
            len(plan.rows), plan.num_tokens, error,
        )  # fmt: skip
        moved = error.moved and (self._shortage is None or self._shortage.moved)
        self._shortage = DeviceMemoryError(str(error), moved)

    def _retreat(self) -> list[TokenEvent]:
        """If a step did not fit: its rows wait again, steps get smaller; one that fits in none ends."""
        if self._shortage is None:
            return []
        error, self._shortage, self._flying = self._shortage, None, None
        hopeless = self.scheduler.retreat(error.moved)
        self.executor.forget()
        text = f"{OUT_OF_MEMORY}: {error}"
        return [
            TokenEvent(sequence.request.request_id, index, finish_reason="error", error=text)
            for sequence in hopeless
            for index in range(sequence.index, sequence.index + 1 + sequence.num_forks)
        ]
