"""Mixtures of experts on a GPU: our kernels by tiles, and the library's forms.

Usage: PYTHONPATH=pkg python benchmarks/gpu_experts.py [--only NAME ...] [--tokens N ...] [--sweep]
                                                       [--seconds S] [--out FILE]

A layer's weights are those of several layers in turn, as in a step: what a cache keeps of one is no help.
Each form is recorded and replayed. "one by one": each chosen expert through the library; it waits for the
device, so its time is the host's clock's; "grouped": torch's grouped products, where it has them. With
--sweep every tile that is worth trying, the two products apart; else the tiles that are chosen. A line tells
at which rate the chosen experts' weights were read, and TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from halyard.hal.kernels.experts import _experts
from halyard.hal.kernels.triton import ahead
from halyard.hal.kernels.triton.experts import (
    ProductTile,
    choose_tile,
    expert_parts,
    plan_pairs,
    product,
)
from halyard.hal.kernels.triton.skinny import arch_of

LAYERS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    experts: int
    choices: int
    hidden: int
    width: int
    oss: bool = False  # transposed, interleaved, clamped, with biases


SHAPES = {
    "30b-a3b": Shape(128, 8, 2048, 768),
    "8x7b": Shape(8, 2, 4096, 14336),
    "20b-a4b": Shape(32, 4, 2880, 2880, oss=True),
    "16b-a3b": Shape(64, 6, 2048, 1408),
}
COLUMNS = {
    16: [(32, 256, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 4, 4), (128, 128, 8, 3), (128, 64, 4, 5)],
    32: [(64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3), (256, 64, 8, 3)],
    64: [(128, 64, 4, 4), (128, 128, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 4, 3)],
    128: [(128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4), (128, 128, 8, 3)],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 8448])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.05, help="for a form")
    parser.add_argument("--out")
    args = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}")
    for name in args.only:
        layers = [weights(SHAPES[name]) for _ in range(LAYERS)]
        for tokens in args.tokens:
            cell(args, name, tokens, layers)
        del layers
        torch.cuda.empty_cache()
    return 0


def weights(shape: Shape) -> tuple[Tensor, ...]:
    def made(*sizes: int) -> Tensor:
        return torch.randn(sizes, device="cuda", dtype=torch.bfloat16) * sizes[-1] ** -0.5

    first = made(shape.experts, 2 * shape.width, shape.hidden)
    second = made(shape.experts, shape.hidden, shape.width)
    if not shape.oss:
        return first, second
    biases = made(shape.experts, 2 * shape.width), made(shape.experts, shape.hidden)
    return *(w.transpose(1, 2).contiguous() for w in (first, second)), *biases


def cell(
    args: argparse.Namespace, name: str, tokens: int, layers: list[tuple[Tensor, ...]]
) -> None:
    shape = SHAPES[name]
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    scores = torch.randn(tokens, shape.experts, device="cuda").softmax(-1)
    scale, ids = scores.topk(shape.choices)
    pairs, chosen = ids.numel(), len(ids.unique())
    flops = 6.0 * pairs * shape.hidden * shape.width
    read = 6.0 * chosen * shape.hidden * shape.width
    options: dict[str, Any] = {"activation": "silu"}
    if shape.oss:
        options = {
            "activation": "swigluoai",
            "transposed": True,
            "interleaved": True,
            "alpha": 1.702,
            "limit": 7.0,
        }

    def tell(form: str, seconds: float, part: float = 1.0) -> None:
        line = {
            "shape": name, "tokens": tokens, "form": form, "us": round(seconds * 1e6, 1),
            "tb_s": round(part * read / seconds / 1e12, 2), "tflops": round(part * flops / seconds / 1e12, 1),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")

    def ours(tile: ProductTile) -> list[Callable[[], object]]:
        def layer(own: tuple[Tensor, ...]) -> Callable[[], object]:
            biases = own[2:] or (None, None)
            more = {"gate_up_bias": biases[0], "down_bias": biases[1], **options}
            return lambda: expert_parts(x, own[0], own[1], ids, scale, tile=tile, **more).sum(1)

        return [layer(own) for own in layers]

    tile = choose_tile(pairs, shape.experts, 2, arch_of(x.device))
    tell(f"ours {tile}", clocked(ours(tile), args.seconds))
    if args.sweep:
        sweep(args, shape, x, ids, scale, layers, options, tell)
        return

    def one(own: tuple[Tensor, ...]) -> Callable[[], object]:
        biases = own[2:] or (None, None)
        return lambda: _experts(x, own[0], own[1], ids, scale, gate_up_bias=biases[0],
                                down_bias=biases[1], **options)  # fmt: skip

    tell("one by one", waited([one(own) for own in layers], args.seconds))
    if not shape.oss and hasattr(torch, "_grouped_mm"):
        tell(
            "grouped",
            clocked([lambda own=own: grouped(x, ids, scale, *own) for own in layers], args.seconds),
        )


def grouped(x: Tensor, ids: Tensor, scale: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sorted, torch's grouped products, and back."""
    flat = ids.flatten()
    order = flat.argsort()
    ends = _ends(flat, first.shape[0])
    tokens = order // ids.shape[1]
    both = torch._grouped_mm(x[tokens], first.transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, -1)
    made = torch._grouped_mm(F.silu(gate) * up, second.transpose(1, 2), offs=ends)
    made = made * scale.flatten()[order, None].to(made.dtype)
    return torch.zeros_like(x).index_add_(0, tokens, made)


def _ends(flat: Tensor, experts: int) -> Tensor:
    counts = torch.zeros(experts, dtype=torch.int32, device=flat.device)
    return (
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        .cumsum(0)
        .to(torch.int32)
    )


def sweep(
    args: argparse.Namespace, shape: Shape, x: Tensor, ids: Tensor, scale: Tensor,
    layers: list[tuple[Tensor, ...]], options: dict[str, Any], tell: Callable[..., None],
) -> None:  # fmt: skip
    """Each product by each tile, with the pairs sorted beforehand; the sorting; the sum."""
    each = ids.numel() / min(shape.experts, ids.numel())
    parts = x.new_empty((ids.numel(), shape.hidden))
    tell("sum", clocked([lambda: parts.view(*ids.shape, -1).sum(1)], args.seconds))
    for rows in COLUMNS:
        if each / 4 <= rows <= max(16, 4 * each):
            tell(
                f"sort for {rows}",
                clocked([lambda rows=rows: plan_pairs(ids, shape.experts, rows)], args.seconds),
            )
            forms = products(shape, rows, x, ids, scale, layers, options["activation"])
            with ahead.compiling_only():
                for calls in forms.values():
                    calls[0]()
            for form, calls in forms.items():
                try:
                    seconds = clocked(calls, args.seconds)
                except Exception as error:  # noqa: BLE001 - a tile that doesn't fit is no news
                    print(f"# {form}: {str(error).splitlines()[0][:100]}")
                else:
                    tell(form, seconds, 2 / 3 if form.startswith("first") else 1 / 3)


def products(
    shape: Shape, rows: int, x: Tensor, ids: Tensor, scale: Tensor, layers: list[tuple[Tensor, ...]],
    activation: str,
) -> dict[str, list[Callable[[], object]]]:  # fmt: skip
    pairs = plan_pairs(ids, shape.experts, rows)
    inner = x.new_empty((ids.numel(), shape.width))
    parts = x.new_empty((ids.numel(), shape.hidden))

    def first(own: tuple[Tensor, ...], tile: ProductTile) -> object:
        w = own[0].transpose(1, 2) if shape.oss else own[0]
        bias = own[2] if shape.oss else None
        return product(
            tile, x, w, bias, None, inner, shape.choices, pairs, activation, shape.oss, 1.702, 7.0
        )

    def second(own: tuple[Tensor, ...], tile: ProductTile) -> object:
        w = own[1].transpose(1, 2) if shape.oss else own[1]
        return product(tile, inner, w, own[3] if shape.oss else None, scale, parts, 1, pairs)

    forms: dict[str, list[Callable[[], object]]] = {}
    for block_n, block_k, warps, stages in COLUMNS[rows]:
        for group in (1, 8):
            tile = ProductTile(rows, block_n, block_k, warps, stages, group)
            for name, one in (("first", first), ("second", second)):
                forms[f"{name} {tile} g{group}"] = [partial(one, own, tile) for own in layers]
    return forms


def clocked(calls: list[Callable[[], object]], seconds: float) -> float:
    """Seconds of a call, recorded and replayed: the median of several rounds."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    found = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 3:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 2e3 / len(calls))
    return statistics.median(found)


def waited(calls: list[Callable[[], object]], seconds: float) -> float:
    """Likewise of calls that wait for the device themselves."""
    calls[0]()
    found = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 2:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) / len(calls))
    return statistics.median(found)


if __name__ == "__main__":
    sys.exit(main())
