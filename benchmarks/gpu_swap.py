"""Swaps of KV blocks over the link, both ways of doing it, against what pinned copies reach.

Usage: python benchmarks/gpu_swap.py [--layers 32] [--kv-heads 8] [--dim 128] [--json FILE]

The link rate is the best of large copies from and to pinned memory in the same run. `kernel` reads
and writes pinned host memory in place, one launch a call; `staged` gathers blocks in a buffer, from
and to which the copy engines move whole ones. Blocks lie scattered in both pools, or side by side.
Every cell is checked bit for bit before it is timed; times include issuing the call from Python. What
moves cost a matrix product that runs beside them comes last.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from halyard.hal.devices.cuda import CudaDevice
from halyard.hal.devices.rocm import RocmDevice
from halyard.hal.kernels.triton.kernels import SwapWay, TritonKernels
from halyard.hal.types import BlockMove, KVSpec

COUNTS = (1, 4, 16, 64, 256)
WAYS: tuple[SwapWay, ...] = ("kernel", "staged")


def best_seconds(call: Callable[[], object], budget: float) -> float:
    """The fastest of many runs, from issue to done."""
    call()
    torch.cuda.synchronize()
    best, stop, runs = float("inf"), time.perf_counter() + budget, 0
    while runs < 3 or time.perf_counter() < stop:
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        runs += 1
    return best


def link_rates(num_bytes: int = 1 << 29) -> tuple[float, float]:
    """Bytes a second of large pinned copies, out (device to host) and in."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    out = best_seconds(lambda: host.copy_(device, non_blocking=True), 0.5)
    back = best_seconds(lambda: device.copy_(host, non_blocking=True), 0.5)
    return num_bytes / out, num_bytes / back


def moves_of(count: int, blocks: int, scattered: bool) -> tuple[list[BlockMove], list[BlockMove]]:
    """Moves out, and the same back into the blocks they came from."""
    ids, places = list(range(blocks)), list(range(blocks))
    if scattered:
        random.Random(count).shuffle(ids)
        random.Random(count + 1).shuffle(places)
    pairs = list(zip(ids[:count], places[:count], strict=True))
    return [BlockMove(a, b) for a, b in pairs], [BlockMove(b, a) for a, b in pairs]


def check(kernels: TritonKernels, pool: Any, host: Any, out: Any, back: Any) -> None:
    """Out and in again must leave the same bits, and put them where the moves say."""
    blocks, places = [m.source for m in out], [m.target for m in out]
    before = pool.data[:, blocks].clone()
    host.data[:, places] = 0
    kernels.swap_out(pool, host, out)
    torch.cuda.synchronize()
    if not torch.equal(host.data[:, places], before.cpu()):
        raise SystemExit("WRONG: swap_out did not copy the blocks")
    pool.data[:, blocks] = 0
    kernels.swap_in(pool, host, back)
    if not torch.equal(pool.data[:, blocks], before):
        raise SystemExit("WRONG: swap_in did not bring the blocks back")


def beside_products(device: Any, way: str, kernels: TritonKernels, pool: Any, host: Any) -> None:
    """Matrix products alone, and with blocks on their way out meanwhile."""
    a = torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(28672, 4096, dtype=torch.bfloat16, device="cuda")
    out, _ = moves_of(max(COUNTS), max(COUNTS), True)

    def products(moves: bool) -> float:
        """Milliseconds of 16 products; what the host took for the moves is printed."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        device.synchronize()
        device.mark()
        began.record()
        for _ in range(16):
            torch.nn.functional.linear(a, b)
        ended.record()
        started = time.perf_counter()
        if moves:
            with device.beside(True):
                kernels.swap_out(pool, host, out)
        host_seconds.append(time.perf_counter() - started)
        device.synchronize()
        return float(began.elapsed_time(ended))

    host_seconds: list[float] = []
    products(True)
    alone, beside = min(products(False) for _ in range(3)), min(products(True) for _ in range(3))
    print(
        f"16 products {alone:.2f} ms, beside {len(out)} blocks by {way} {beside:.2f} ms "
        f"({beside / alone:.3f}x); the host takes {1e3 * min(host_seconds[-3:]):.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.3, help="a cell")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    device: Any = (RocmDevice if torch.version.hip else CudaDevice)()
    spec = KVSpec(options.layers, options.kv_heads, options.dim, "bfloat16", options.block)
    sets = {way: TritonKernels(device, swap=way) for way in WAYS}
    layout = sets["kernel"].layout(spec)
    blocks = max(COUNTS) + 64
    pool = device.allocate_kv(layout, blocks, host=False)
    host = device.allocate_kv(layout, blocks, host=True)
    pool.data.normal_()
    rate_out, rate_in = link_rates()
    print(
        f"{device.info.name}, torch {torch.__version__}, {layout.bytes_per_block / 2**20:.2f} MiB a "
        f"block, pinned: {host.data.is_pinned()}, link out {rate_out / 1e9:.1f} GB/s, in "
        f"{rate_in / 1e9:.1f} GB/s"
    )
    results = []
    with torch.inference_mode():
        for scattered in (True, False):
            for count in COUNTS:
                out, back = moves_of(count, blocks, scattered)
                for way, kernels in sets.items():

                    def call_out(k: TritonKernels = kernels, m: Any = out) -> None:
                        with device.beside(False):
                            k.swap_out(pool, host, m)

                    def call_in(k: TritonKernels = kernels, m: Any = back) -> None:
                        with device.beside(False):
                            k.swap_in(pool, host, m)

                    with device.beside(False):
                        check(kernels, pool, host, out, back)
                    size = count * layout.bytes_per_block
                    rates = [size / best_seconds(c, options.seconds) for c in (call_out, call_in)]
                    shares = rates[0] / rate_out, rates[1] / rate_in
                    print(
                        f"{count:4} blocks {'scattered' if scattered else 'in a row ':9} {way:6}  "
                        f"out {rates[0] / 1e9:6.1f} GB/s ({shares[0]:4.0%} of link)  "
                        f"in {rates[1] / 1e9:6.1f} GB/s ({shares[1]:4.0%})",
                        flush=True,
                    )
                    results.append({"blocks": count, "scattered": scattered, "way": way,
                                    "out": rates[0], "in": rates[1]})  # fmt: skip
        for way, kernels in sets.items():
            beside_products(device, way, kernels, pool, host)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"link_out": rate_out, "link_in": rate_in, "cells": results}, file, indent=1)
    device.close()


if __name__ == "__main__":
    main()
