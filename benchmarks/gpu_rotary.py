"""Rotary embedding of queries and keys on a GPU: our operator against Inductor's of transformers' form.

Usage: python benchmarks/gpu_rotary.py [--rows 1 8448 ...] [--only 8b] [--sweep] [--rounds N] [--out FILE]

q, k and v are parts of one product, as in a model. Times are medians of rounds that take the forms in
turn, each a CUDA graph of many calls, or those calls launched from Python one by one. Inputs take turns
too: of many rows no cache holds them from one call to the next. One line a form: ms a call, GB/s of what
must be read and written, and the largest error against fp64, in units of the result's last place.
--sweep: all tiles that a program may take, the quickest first.
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

from halyard.hal.kernels.triton.rotary import RotaryTile, rotary_tile, rotate, rotate_pair

SHAPES = {"1b": (32, 8, 64), "8b": (32, 8, 128)}  # heads, kv heads, dim
Pair = tuple[Tensor, Tensor]
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Pair]
_COLD = 256 << 20  # bytes of inputs that take turns: more than a cache holds
_CALLS = 64  # of a graph, at most
_TILES = [
    (tokens, splits, warps) for tokens in (1, 2, 4, 8) for splits in (1, 2, 4) for warps in (1, 2, 4, 8)
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256, 2048, 8448])
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out")
    args = parser.parse_args()
    for shape in args.only:
        for rows in args.rows:
            cell(args, shape, rows)
    return 0


def cell(args: argparse.Namespace, shape: str, rows: int) -> None:
    heads, kv_heads, dim = SHAPES[shape]
    size = 2 * (2 * rows * (heads + kv_heads) * dim + 2 * rows * dim)  # bytes of bf16
    inputs = [made(rows, heads, kv_heads, dim) for _ in range(max(2, min(_CALLS, _COLD // size)))]
    torch.compiler.reset()  # it stops compiling after a few shapes
    forms: dict[str, Form] = {
        "transformers' by Inductor": torch.compile(transformers_form, dynamic=False),
        "operator": rotate_pair,
    }
    own = rotary_tile(heads, kv_heads, dim)
    if args.sweep:
        for tile in [RotaryTile(*numbers) for numbers in _TILES]:
            constants = tile.constants(heads, kv_heads, dim)
            held = tile.tokens * constants["Q_TILE"] * constants["HALF_PAD"]
            if 4 <= held // (32 * tile.num_warps) <= 64:
                forms[f"{tile}{' (chosen)' if tile == own else ''}"] = by_tile(tile)
    began = time.monotonic()
    found = timed(forms, inputs, args.rounds)
    for name in sorted(forms, key=lambda name: found[name] if args.sweep else 0.0):
        line: dict[str, Any] = {
            "cell": f"{shape} x {rows}", "form": name, "ms": round(found[name], 5),
            "gb_s": round(size / found[name] / 1e6, 1), "error": error(forms[name], inputs[0]),
            "ms_from_python": round(found[f"{name}, from Python"], 5),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")
    print(f"{shape} x {rows}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def by_tile(tile: RotaryTile) -> Form:
    return lambda q, k, cos, sin: rotate(q, k, cos, sin, tile)


def made(rows: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    product = torch.randn(rows, heads + 2 * kv_heads, dim, device="cuda").to(torch.bfloat16)
    q, k, _ = product.split([heads, kv_heads, kv_heads], 1)
    angle = torch.rand(rows, dim // 2, device="cuda").repeat(1, 2) * 6.28
    return q, k, angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)


def transformers_form(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """As a traced model has it: heads before tokens."""

    def rotated(x: Tensor) -> Tensor:
        x = x.transpose(0, 1)[None]
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return (x * cos[None, None] + turned * sin[None, None])[0].transpose(0, 1)

    return rotated(q), rotated(k)


def error(form: Form, given: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """The largest difference from fp64, in last places (of numbers from 1/16 on)."""
    most = 0.0
    truth = transformers_form(*(x.double() for x in given))
    for found, wanted in zip(form(*given), truth, strict=True):
        place = (
            torch.finfo(torch.bfloat16).eps * 2.0 ** wanted.abs().clamp(min=1 / 16).log2().floor()
        )
        most = max(most, ((found.double() - wanted).abs() / place).max().item())
    return round(most, 3)


def timed(
    forms: dict[str, Form], inputs: list[tuple[Tensor, Tensor, Tensor, Tensor]], rounds: int
) -> dict[str, float]:
    """ms a call of each form, within a CUDA graph and (", from Python") without."""
    runs: dict[str, Callable[[], None]] = {}
    for name, form in forms.items():

        def calls(form: Form = form) -> None:
            for call in range(_CALLS):
                form(*inputs[call % len(inputs)])

        calls()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        runs |= {name: graph.replay, f"{name}, from Python": calls}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / _CALLS)
    return {name: statistics.median(all_[1:]) for name, all_ in times.items()}


if __name__ == "__main__":
    sys.exit(main())
