"""Runs a backend's cases in worker processes: one that crashes or hangs costs one red cell.

A worker runs cases one after another. When it dies, the case it was in has crashed; when a case
takes longer than it may, the worker is killed and the case has hung. The rest goes on in a new one.
Each worker has a session of its own: Ctrl-C reaches us alone, and what a case has started (a server,
say) ends with its worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case

__all__ = ["Interrupted", "run_cases"]

_START_SECONDS = 120.0  # for a worker to import and open its device
Result = dict[str, Any]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while cases ran; `results` are those that came to an end before."""

    def __init__(self, results: list[Result]) -> None:
        super().__init__()
        self.results = results


class _Workers:
    """The processes that run now, so that all of them can be ended at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def add(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.add(process)
            if self.stopped:
                _kill(process)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what is left of a worker, its own children included, and forget it."""
        with self._lock:
            self._running.discard(process)
        _kill(process)
        process.wait()

    def stop(self) -> None:
        """Kill all, and whatever is added from now on."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # A worker that has died may have left children: its group still has its number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run_cases(
    backend: BackendUnderTest,
    cases: Sequence[Case],
    tell: Callable[[Result], None] = lambda result: None,
    jobs: int = 1,
    patience: float = 1.0,
) -> list[Result]:
    """Results in the order of the cases; `tell` is called with each as it comes.

    Args:
        jobs: workers at a time. Cases measure no time, so they may share a machine and a device.
        patience: how much longer than its own time a case may take before it has hung.

    Raises:
        Interrupted: Ctrl-C. No worker is left, nor anything that one has started.
    """
    results: dict[str, Result] = {}
    lock = threading.Lock()

    def keep(result: Result) -> None:
        with lock:
            results[result["id"]] = result
            tell(result)

    waiting: list[Case] = []
    for case in cases:
        reasons = case.unclaimed(backend)
        if reasons:
            keep(_plain(case, "not_claimed", "; ".join(reasons)))
        else:
            waiting.append(replace(case, seconds=case.seconds * patience))

    workers = _Workers()

    def work(own: list[Case]) -> None:
        while own and not workers.stopped:
            own = _run_worker(backend, own, keep, workers)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            # Dealt out one by one: the long ones of a level don't fall to one worker.
            for future in [pool.submit(work, waiting[first::jobs]) for first in range(jobs)]:
                future.result()
        except KeyboardInterrupt:
            with lock:
                done = [results[case.id] for case in cases if case.id in results]
            raise Interrupted(done) from None
        finally:  # before the pool waits for its threads, which wait for their workers
            workers.stop()
    return [results[case.id] for case in cases]


def _plain(case: Case, status: str, message: str, detail: str = "", seconds: float = 0.0) -> Result:
    return {
        "id": case.id, "status": status, "seconds": round(seconds, 4), "error": None,
        "limit": None, "message": message, "detail": detail, "notes": {},
    }  # fmt: skip


def _run_worker(
    backend: BackendUnderTest,
    cases: list[Case],
    keep: Callable[[Result], None],
    workers: _Workers,
) -> list[Case]:
    """Run as many of the cases as one worker lives for; those that are left."""
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-m", "halyard.hal.conformance.worker", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=noise,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            env=_environment(),
            start_new_session=True,
        )
        workers.add(process)
        os.close(write_end)
        job = {
            "backend": backend.name,
            "matrix": str(backend.matrix) if backend.matrix else "",
            "cases": [case.id for case in cases],
        }
        try:
            if process.stdin is None:
                raise AssertionError("the worker has no stdin")
            try:
                process.stdin.write(json.dumps(job).encode())
                process.stdin.close()
            except BrokenPipeError:  # it died at once: told below, with what it said
                pass
            done, cause, seconds = _listen(read_end, process, cases, keep)
        finally:
            os.close(read_end)
            workers.end(process)
        if workers.stopped or done == len(cases):
            return []
        noise.seek(0)
        said = noise.read().decode(errors="replace")[-3000:]
    if cause == "hung":
        message = f"it took longer than {cases[done].seconds:.0f} s"
    else:
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        message = f"the process ended with {how}"
    keep(_plain(cases[done], cause, message, said, seconds))
    return cases[done + 1 :]


def _environment() -> dict[str, str]:
    """The worker finds the same package as we do, wherever that came from.

    And its OpenMP threads sleep at barriers: beside another worker, or whatever else keeps the cores
    busy, each spin lasts a time slice. Two runs at once took 18 s instead of 4.
    """
    import halyard

    root = str(Path(halyard.__path__[0]).parent)
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    return {"GOMP_SPINCOUNT": "0"} | os.environ | {"PYTHONPATH": found}


def _listen(
    pipe: int, process: subprocess.Popen[bytes], cases: list[Case], keep: Callable[[Result], None]
) -> tuple[int, str, float]:
    """How many cases came to an end, and "crashed" or "hung" for the one after, with its seconds."""
    done, buffer = 0, b""
    since, allowed = time.monotonic(), _START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while done < len(cases):
            left = since + allowed - time.monotonic()
            if left <= 0:
                return done, "hung", time.monotonic() - since
            if not selector.select(left):
                continue
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                process.wait()
                return done, "crashed", time.monotonic() - since
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "start" in message:
                    since, allowed = time.monotonic(), cases[done].seconds
                else:
                    keep(message)
                    done += 1
    return done, "", 0.0
