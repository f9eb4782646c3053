"""An executor whose device works in a thread of its own and is always late.

Steps are packed when they are planned and run in order, later: what the host does meanwhile must not
reach them. `token_ids` of a running step belong to the device's side, as a GPU's do.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from halyard.runtime.executor import Executor, PreparedStep
from halyard.runtime.llm import LLM
from halyard.runtime.plan import StepOutput
from halyard.runtime.running import RunningStep
from halyard.runtime.sampler import Draw

__all__ = ["make_late"]


class _LateStep:
    """A handle that is known before the step has run."""

    def __init__(self, running: Future[RunningStep], device: ThreadPoolExecutor) -> None:
        self.running = running
        self._device = device

    def draw(self, how: Draw) -> None:
        """Behind all that was issued; what the host knows of it is known now."""
        running = self.running

        def work() -> RunningStep:
            running.result().draw(how)
            return running.result()

        self.running = self._device.submit(work)

    def ready(self) -> bool:
        return self.running.done()

    def wait(self) -> StepOutput:
        return self.running.result().wait()


class _LateIssue:
    def __init__(self, executor: Executor, most_seconds: float, seed: int) -> None:
        self._issue = executor.issue
        self._device = ThreadPoolExecutor(1)
        self._random = random.Random(seed)
        self._most_seconds = most_seconds
        self.issued = self.issued_behind = 0

    def __call__(self, step: PreparedStep, before: Any = None) -> Any:
        self.issued += 1
        self.issued_behind += before is not None
        pause = self._random.random() * self._most_seconds
        ahead = before.running if before is not None else None

        def work() -> RunningStep:
            time.sleep(pause)
            return self._issue(step, ahead.result() if ahead is not None else None)

        return _LateStep(self._device.submit(work), self._device)


def make_late(llm: LLM, most_seconds: float = 0.0005, seed: int = 0) -> _LateIssue:
    """Make an engine's device late, and let the engine issue steps behind each other."""
    executor = llm.engine.executor
    late = _LateIssue(executor, most_seconds, seed)
    executor.issue = late  # type: ignore[method-assign, assignment]
    executor.overlaps = llm.engine.overlap = True
    return late
