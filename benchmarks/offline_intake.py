"""An offline workload over an emulated GPU: what the host's part costs while prompts come in. Needs no GPU.

Usage: python benchmarks/offline_intake.py [--workload prefix] [--runs 6] [--launch 33] [--rate 44000]
                                           [--decode 9.05]

The engine's own work is real (intake, digests, plans, packing, commits); the device is a clock. A step
with prompts takes the host --launch ms and the device its tokens at --rate a second, another step 1.2
and --decode ms; steps are issued behind each other. Prints for each run but the first the milliseconds
it took, and for how many of them the device had nothing to do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

from halyard.models.shapes import shape_config
from halyard.runtime import bench
from halyard.runtime.llm import LLM
from halyard.runtime.workloads import load_workload

_VOCABULARY = 1024
_WITH_PROMPTS = 300  # tokens: a step of more has prompts in it
_DECODE_LAUNCH = 0.0012


class Clock:
    """Stands in for the executor's run: the null backend computes, and the answer comes in time."""

    def __init__(self, run: Any, options: argparse.Namespace) -> None:
        self._run, self._options = run, options
        self.reset()

    def reset(self) -> None:
        self._free = self.idle = 0.0

    def __call__(self, plan: Any, before: Any = None) -> Any:
        options, prompts = self._options, plan.num_tokens > _WITH_PROMPTS
        began = time.perf_counter() + 0.001  # the first kernel
        step, running = self._run(plan, before)
        wait_until(time.perf_counter() + (options.launch / 1e3 if prompts else _DECODE_LAUNCH))
        self.idle += max(0.0, began - self._free) if self._free else 0.0
        takes = plan.num_tokens / options.rate if prompts else options.decode / 1e3
        self._free = max(max(self._free, began) + takes, time.perf_counter())
        return step, Late(running, self._free)


class Late:
    """A running step whose tokens are there at `done`."""

    def __init__(self, running: Any, done: float) -> None:
        self._running, self._done = running, done

    def ready(self) -> bool:
        return time.perf_counter() >= self._done

    def wait(self) -> Any:
        wait_until(self._done)
        return self._running.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._running, name)


def wait_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left if left > 0.002 else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--workload", default="prefix")
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--launch", type=float, default=33.0)
    parser.add_argument("--rate", type=float, default=44_000.0)
    parser.add_argument("--decode", type=float, default=9.05)
    options = parser.parse_args()
    config = shape_config("8b")
    config.vocab_size = _VOCABULARY
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = LLM(
            folder, backend="null", load_format="dummy", kv_blocks=40_000, host_kv_blocks=0,
            max_batched_tokens=8448, max_num_sequences=1024,
        )  # fmt: skip
    program: Any = llm.engine.executor.program
    logits = torch.zeros(1024, _VOCABULARY)
    program.run = lambda ids, rows, batch: logits[: len(rows)]  # no time for logits of its own
    clock = Clock(llm.engine.executor.run, options)
    llm.engine.executor.run = clock  # type: ignore[method-assign]
    llm.engine.executor.overlaps = llm.engine.overlap = True
    workload = load_workload(options.workload, _VOCABULARY, "gpu")
    found = []
    for _ in range(options.runs):
        clock.reset()
        seconds = bench._run(llm, workload)
        found.append((round(1e3 * seconds, 1), round(1e3 * clock.idle, 1)))
    llm.close()
    print(*found[1:], "median", statistics.median(took for took, _ in found[1:]))


if __name__ == "__main__":
    main()
