"""Products of many rows and what follows them, on a GPU: where adds and gates should happen.

Usage: python benchmarks/gpu_wide_linears.py [--rows 8448 ...] [--only 1b] [--parts gated] [--rounds N]
                                             [--out FILE]

added: apart, the library's product, then one kernel that adds and norms; in place, the library's
product adds to the residual itself, then a kernel norms. gated (Hopper): a feed-forward layer's first
product by the library and the gate by a kernel, or both by hal/kernels/triton/hopper_linear.py. Times
are medians of rounds that take the forms in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHAPES = {"1b": (2048, 8192, 2048), "8b": (4096, 14336, 4096)}  # hidden, intermediate, heads x dim
Form = Callable[[], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=[8448])
    parser.add_argument(
        "--parts", nargs="+", choices=("added", "gated"), default=["added", "gated"]
    )
    parser.add_argument("--only", nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out")
    args = parser.parse_args()
    for shape in args.only:
        hidden, width, heads = SHAPES[shape]
        for rows in args.rows:
            if "gated" in args.parts:
                gated(args, f"{shape} gate, up", rows, hidden, width)
            if "added" in args.parts:
                for name, inputs in (("o", heads), ("down", width)):
                    added(args, f"{shape} {name}", rows, inputs, hidden)
    return 0


def made(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)


def gated(args: argparse.Namespace, cell: str, rows: int, inputs: int, outputs: int) -> None:
    from halyard.hal.kernels.triton.gated import gate, gated_on_hopper

    x, w = made(rows, inputs), made(2 * outputs, inputs, scale=inputs**-0.5)
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    forms: dict[str, Form] = {
        "product alone": lambda: torch.nn.functional.linear(x, w),
        "product, gate": lambda: gate(torch.nn.functional.linear(x, w), False),
        "product with its gate": lambda: gated_on_hopper(x, w, False, cores),
    }
    tell(args, f"{cell} x {rows}", forms, 4 * rows * inputs * outputs)


def added(args: argparse.Namespace, cell: str, rows: int, inputs: int, hidden: int) -> None:
    x, w = made(rows, inputs), made(hidden, inputs, scale=inputs**-0.5)
    residual, gain = made(rows, hidden), made(hidden)
    target = residual.clone()

    @torch.compile(dynamic=False)
    def add_norm(y: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = (y + residual).float()
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y + residual, (total * scale).to(y.dtype) * gain

    @torch.compile(dynamic=False)
    def norm(total: Tensor) -> Tensor:
        wide = total.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (wide * scale).to(total.dtype) * gain

    def apart() -> Tensor:
        return add_norm(torch.nn.functional.linear(x, w), residual)[1]

    def in_place() -> Tensor:
        return norm(target.addmm_(x, w.T))

    forms: dict[str, Form] = {
        "product alone": lambda: torch.nn.functional.linear(x, w),
        "product, add+norm": apart,
        "product adds, norm": in_place,
        "adding product alone": lambda: target.addmm_(x, w.T),
    }
    tell(args, f"{cell} x {rows}", forms, 2 * rows * inputs * hidden)


def tell(args: argparse.Namespace, cell: str, forms: dict[str, Form], flops: int) -> None:
    """Time the forms in turn, and print and keep the medians."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    calls = 8
    for form in forms.values():
        form()
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(args.rounds):
        for name, form in forms.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                form()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / calls)
    for name, found in times.items():
        median = statistics.median(found)
        line: dict[str, Any] = {
            "cell": cell, "form": name, "ms": round(median, 4), "least": round(min(found), 4),
            "most": round(max(found), 4), "tflops": round(flops / median / 1e9, 1),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")
    print(f"{cell}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
