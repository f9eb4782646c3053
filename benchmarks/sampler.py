"""What sampling costs a step: absolute, and as a multiple of a plain argmax in the same run.

PYTHONPATH=pkg python benchmarks/sampler.py [--rows 1 16 256] [--vocab 32000 128256] [--device cuda]

Host time is in it; what the drawing kernels alone take on a GPU: benchmarks/gpu_linear.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from halyard.hal.contract import DrawingKernels
from halyard.runtime.plan import PlanRow
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.sampler import Sampler
from halyard.runtime.samples import SampleRow
from halyard.runtime.sequence import Sequence

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy + logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "plain sampling": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "penalties, greedy": {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}
CONTEXT = 1024  # tokens of each sequence, half of them the answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--scale", type=float, default=3.0, help="standard deviation of the logits")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    kernels = _kernels(args.device)
    print(f"{'vocab':>7} {'rows':>5}  {'case':<20} {'ms':>9} {'x argmax':>9}")
    for vocab in args.vocab:
        for rows in args.rows:
            logits = torch.randn(rows, vocab, device=args.device) * args.scale
            base = _median(partial(torch.argmax, logits, -1), args.device)
            print(f"{vocab:>7} {rows:>5}  {'(argmax)':<20} {base * 1e3:>9.3f} {1:>9.1f}")
            for name, options in CASES.items():
                batch = [_row(index, vocab, options) for index in range(rows)]
                sampler = Sampler(vocab, kernels)
                seconds = _median(partial(sampler.sample, logits, batch), args.device)
                print(
                    f"{vocab:>7} {rows:>5}  {name:<20} {seconds * 1e3:>9.3f} {seconds / base:>9.1f}",
                    flush=True,
                )


def _kernels(device: str) -> DrawingKernels | None:
    """The kernels that an engine on that device draws with."""
    if device == "cpu":
        return None
    from halyard.hal.devices.cuda import CudaDevice
    from halyard.hal.devices.rocm import RocmDevice
    from halyard.hal.kernels.triton.kernels import TritonKernels

    opened: Any = (RocmDevice if torch.version.hip else CudaDevice)()
    return TritonKernels(opened)


def _row(index: int, vocab: int, options: dict[str, Any]) -> SampleRow:
    tokens = [(index * 7919 + position * 104729) % vocab for position in range(CONTEXT)]
    params = SamplingParams(max_tokens=CONTEXT, **options)
    request = Request(str(index), tuple(tokens[: CONTEXT // 2]), params, CONTEXT, seed=index)
    sequence = Sequence(index, request, 0, tokens, CONTEXT // 2)
    return SampleRow(PlanRow(sequence, CONTEXT - 1, 1, 1), 0, index)


def _median(work: Callable[[], object], device: str, budget: float = 1.0) -> float:
    """Median seconds of a call; at least 3 calls, as many as fit in `budget` seconds."""
    times: list[float] = []
    with torch.inference_mode():
        work()
        started = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - started < budget and len(times) < 50):
            _finish(device)
            begun = time.perf_counter()
            work()
            _finish(device)
            times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def _finish(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    main()
