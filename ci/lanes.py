"""Runs the lanes of ci/matrix.py, one a core at a time, and prints each one's output when it is done.

Usage: python ci/lanes.py [--jobs N] [--lane NAME ...] [--seconds S] [--part beside|rest]

`--part beside` runs what only computes, at the lowest priority: beside the tests, which often wait. The
packages that it needs and the tests must do without may lie in build/backends. `--part rest` runs the
others. Exit status 1 if a lane failed or took too long. Reports of the suite go to build/lanes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from matrix import Lane, lanes

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "lanes"
BACKENDS = ROOT / "build" / "backends"

# Longest first, so that the last ones to run are short.
_LONG = ("tests-tvm", "cpu", "arm64", "tests-triton", "triton-interpreter", "tvm", "tvm-targets",
         "triton-targets")  # fmt: skip
_BESIDE = ("arm64", "triton-targets", "tvm-targets")  # not the suite's: its cells have deadlines
_running: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a lane went."""

    lane: Lane
    status: int  # the exit status; -1 if it took too long
    seconds: float
    output: str


def run_lane(lane: Lane, seconds: float) -> Outcome:
    """Run one lane to its end, or kill it and all it started after `seconds`."""
    command = [sys.executable, *lane.arguments]
    if "conformance" in lane.arguments:
        command += ["--report", str(REPORTS)]
    path = [ROOT / "pkg", *([BACKENDS] if lane.lane in _BESIDE else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)), "GOMP_SPINCOUNT": "0", **lane.environment
    }  # fmt: skip
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        _running.add(process)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return Outcome(lane, -1, time.monotonic() - started, output)
        finally:
            _running.discard(process)
    return Outcome(lane, process.returncode, time.monotonic() - started, output)


def yield_to_others() -> None:
    """This process and what it starts run when nobody else wants to. (The lowest niceness takes a share.)"""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # no Linux, or not allowed
        os.nice(19)


def stop_on_signals() -> None:
    """Lanes are sessions of their own: what stops this program must not leave them running."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for process in tuple(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="lanes at a time")
    parser.add_argument("--lane", nargs="+", default=[], help="only these")
    parser.add_argument("--seconds", type=float, default=1200.0, help="that a lane may take")
    parser.add_argument(
        "--part", choices=("beside", "rest"), help="beside the tests, or after them"
    )
    args = parser.parse_args()
    chosen = lanes()
    unknown = set(args.lane) - {lane.lane for lane in chosen}
    if unknown:
        parser.error(f"no lane {', '.join(sorted(unknown))} here: python ci/matrix.py --all")
    chosen = [lane for lane in chosen if not args.lane or lane.lane in args.lane]
    if args.part is not None:
        chosen = [lane for lane in chosen if (lane.lane in _BESIDE) == (args.part == "beside")]
    if args.part == "beside":
        yield_to_others()
    chosen.sort(key=lambda lane: _LONG.index(lane.lane) if lane.lane in _LONG else len(_LONG))
    outcomes = []
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        for future in as_completed([pool.submit(run_lane, lane, args.seconds) for lane in chosen]):
            outcome = future.result()
            outcomes.append(outcome)
            words = " ".join(f"{k}={v}" for k, v in outcome.lane.environment.items())
            told = shlex.join(["python", *outcome.lane.arguments])
            print(
                f"==== {outcome.lane.lane}: {words} {told}\n{outcome.output.rstrip()}", flush=True
            )
    for outcome in outcomes:
        how = {0: "passed", -1: "TOO SLOW"}.get(outcome.status, f"FAILED ({outcome.status})")
        print(f"{outcome.lane.lane:<20} {how:<12} {outcome.seconds:5.0f} s")
    return int(any(outcome.status for outcome in outcomes))


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
