"""Triton's paged attention on a GPU: time, achieved bandwidth and rivals, after checking the result.

Usage: python benchmarks/gpu_attention.py [--dtype bfloat16] [--heads 32] [--kv-heads 8] [--dim 128]
                                          [--sweep] [--json FILE]

Decode: GB/s counts the keys and values of all rows read once; `of copy` is that over what a copy
of a large tensor reaches in the same run (reads plus writes). Each cell cycles through rows in
other blocks until the second-level cache can't help, as one layer after the other does in a model.
Calls are timed as a captured graph: the device's time, without Python's. Rivals: `sdpa` gathers the
blocks and calls scaled_dot_product_attention with the group folded into query rows; `flash` is
torch.nn.attention.varlen, on pages of 256 tokens where it takes a block table, else on contiguous
keys (which no paged cache has); `portable` is the prefill kernel that every GPU has, where this one
has its own; `narrow` Hopper's own for short prompts, where this one is for long ones. --sweep tries other tiles and splits and prints the best of a cell.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from halyard.hal.devices.cuda import CudaDevice
from halyard.hal.devices.rocm import RocmDevice
from halyard.hal.dtypes import torch_dtype
from halyard.hal.kernels.triton.kernels import TritonKernels
from halyard.hal.kernels.triton.tiles import Tile, WideTile, hopper_tile, prefill_tile
from halyard.hal.types import AttentionLayer, KVPool, KVSpec, StepBatch

BLOCK = 16
COLD_BYTES = 1 << 28  # a cell cycles through this much, more than any second-level cache
MAX_COPIES = 64
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # error: see Bench.error
Call = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """Rows of (queries, context): the context includes the queries."""

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def decode(self) -> bool:
        return all(queries == 1 for queries, _ in self.rows)

    @property
    def context(self) -> int:
        return sum(context for _, context in self.rows)

    @property
    def pairs(self) -> int:
        """Query-key pairs that are computed, one head."""
        return sum(n * (length - n) + n * (n + 1) // 2 for n, length in self.rows)


CELLS = [
    Cell(f"decode {rows} x {context}", ((1, context),) * rows)
    for rows, context in itertools.product((1, 64, 256), (1024, 8192, 32768))
] + [
    Cell("prefill 1 x 8192", ((8192, 8192),)),
    Cell("prefill 2 x 4000", ((4000, 4000),) * 2),
    Cell("prefill 8 x 1024", ((1024, 1024),) * 8),
    Cell("chunk 512 of 16384", ((512, 16384),)),
    Cell("mixed 63 x 4096 + 512", ((1, 4096),) * 63 + ((512, 2048),)),
]


class Bench:
    """One device, one pool, one shape of heads."""

    def __init__(self, options: argparse.Namespace) -> None:
        vendor = RocmDevice if torch.version.hip else CudaDevice
        self.device: Any = vendor()
        self.kernels = TritonKernels(self.device)
        self.dtype = torch_dtype(options.dtype)
        self.heads, self.kv_heads, self.dim = options.heads, options.kv_heads, options.dim
        self.token_bytes = 2 * self.kv_heads * self.dim * self.dtype.itemsize
        spec = KVSpec(1, self.kv_heads, self.dim, options.dtype, BLOCK)
        most = max(cell.context for cell in CELLS) * self.token_bytes
        size = min(most + (1 << 28), int(self.device.memory().free * 0.7))
        blocks = size // (BLOCK * self.token_bytes) // 16 * 16
        self.pool: KVPool = self.device.allocate_kv(self.kernels.layout(spec), blocks, host=False)
        torch.manual_seed(0)
        self.pool.data.normal_()  # the last use of the GPU's generator: a failed capture breaks it
        self.layer = AttentionLayer(0, self.heads, self.kv_heads, self.dim, self.dim**-0.5)
        self.copy_rate = self._measure_copy()

    def _measure_copy(self) -> float:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds([lambda: target.copy_(source)], 0.3)

    def headline(self, dtype: str) -> str:
        return (
            f"{self.device.info.name}, torch {torch.__version__}, {dtype}, heads "
            f"{self.heads}/{self.kv_heads} dim {self.dim}, block {BLOCK}, copy "
            f"{self.copy_rate / 1e9:.0f} GB/s"
        )

    def seconds(self, calls: list[Call], budget: float) -> float:
        """Device time of one call: the best of the repeats, all calls in one captured graph."""

        def every() -> None:
            for call in calls:
                call()

        replay = self.device.capture(every) or every
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        best, stop = float("inf"), time.perf_counter() + budget
        repeats = 0
        while repeats < 3 or time.perf_counter() < stop:
            begin.record()
            replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
            repeats += 1
        return best / len(calls)

    def batches(self, cell: Cell) -> list[StepBatch]:
        """Batches of a cell in blocks of their own, as many as keep the cache cold."""
        needs = [-(-context // BLOCK) for _, context in cell.rows]
        fit = min(MAX_COPIES, -(-COLD_BYTES // (cell.context * self.token_bytes)))
        order = torch.randperm(self.pool.num_blocks).to(torch.int32).cuda()
        copies = max(1, min(fit, self.pool.num_blocks // sum(needs)))
        return [self._batch(cell, needs, order[n * sum(needs) :]) for n in range(copies)]

    def _batch(self, cell: Cell, needs: list[int], blocks: Tensor) -> StepBatch:
        tables = torch.full((len(needs), max(needs)), -1, dtype=torch.int32, device="cuda")
        first = 0
        slots, starts = [], [0]
        for row, ((queries, context), need) in enumerate(zip(cell.rows, needs, strict=True)):
            tables[row, :need] = blocks[first : first + need]
            first += need
            position = torch.arange(context - queries, context, device="cuda")
            slots.append(tables[row, position // BLOCK].long() * BLOCK + position % BLOCK)
            starts.append(starts[-1] + queries)
        contexts = torch.tensor([c for _, c in cell.rows], dtype=torch.int32, device="cuda")
        return StepBatch(
            num_tokens=starts[-1],
            num_rows=len(needs),
            max_query_len=max(queries for queries, _ in cell.rows),
            max_seq_len=max(context for _, context in cell.rows),
            positions=torch.zeros(starts[-1], dtype=torch.int64, device="cuda"),
            slot_mapping=torch.cat(slots),
            block_tables=tables,
            seq_lens=contexts,
            query_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        )

    def inputs(self, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
        tokens = sum(queries for queries, _ in cell.rows)
        draw = [
            torch.randn(tokens, heads, self.dim).to(self.dtype).cuda()
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]
        return draw[0], draw[1], draw[2]

    def error(self, batch: StepBatch, qkv: tuple[Tensor, Tensor, Tensor]) -> float:
        """Worst error against fp64 over the last queries of some rows, relative to the largest."""
        out = self.kernels.attend(*qkv, self.pool, self.layer, batch)
        starts, worst = batch.query_start.tolist(), 0.0
        for row in {0, batch.num_rows // 2, batch.num_rows - 1}:
            length = int(batch.seq_lens[row])
            used = batch.block_tables[row, : -(-length // BLOCK)].long()
            kv = self.pool.data[0, used].transpose(1, 2)  # [blocks, heads, 2, size, dim]
            keys, values = kv.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :length].double()
            first, last = max(starts[row], starts[row + 1] - 64), starts[row + 1]
            group = self.heads // self.kv_heads
            query = qkv[0][first:last].double().view(-1, self.kv_heads, group, self.dim)
            scores = torch.einsum("thgd,hkd->thgk", query, keys) * self.layer.scale
            position = length - (last - first) + torch.arange(last - first, device="cuda")
            hidden = torch.arange(length, device="cuda")[None] > position[:, None]
            scores.masked_fill_(hidden[:, None, None], -torch.inf)
            truth = torch.einsum("thgk,hkd->thgd", scores.softmax(-1), values).flatten(1, 2)
            off = (out[first:last].double() - truth).abs().max() / truth.abs().max()
            worst = max(worst, off.nan_to_num(float("inf")).item())
        return worst

    def rivals(self, cell: Cell, query: Tensor, copies: int) -> Iterator[tuple[str, list[Call]]]:
        """Calls on the same memory, seen as their layout: what it holds is random anyway."""
        queries, context = cell.rows[0]
        if len(set(cell.rows)) > 1:
            return
        rows, halves = len(cell.rows), self.pool.data.view(-1).chunk(2)
        shape = (-1, self.kv_heads, self.dim)
        if cell.decode and 4 * cell.context * self.token_bytes < self.device.memory().free:
            k, v = (half.view(-1, BLOCK, *shape[1:]) for half in halves)
            per_row = context // BLOCK
            folded = query.view(rows, self.kv_heads, -1, self.dim)
            tables = [torch.randint(len(k), (rows * per_row,)).cuda() for _ in range(copies)]

            def gathered(table: Tensor) -> Tensor:
                wide = [x[table].view(rows, context, *shape[1:]).transpose(1, 2) for x in (k, v)]
                return scaled_dot_product_attention(folded, *wide)

            yield "sdpa", [lambda t=t: gathered(t) for t in tables]
        yield from self._flash(rows, queries, context, query, halves, copies)

    def _flash(
        self, rows: int, queries: int, context: int, query: Tensor, halves: Any, copies: int
    ) -> Iterator[tuple[str, list[Call]]]:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return
        known = inspect.signature(varlen_attn).parameters
        extra: dict[str, Any] = {}
        if "window_size" in known:
            extra["window_size"] = (-1, 0)
        else:
            extra["is_causal"] = True
        if "enable_gqa" in known:
            extra["enable_gqa"] = True
        starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        tail = (self.kv_heads, self.dim)
        if "block_table" in known and context % 256 == 0:
            k, v = (half[: half.numel() // (256 * tail[0] * tail[1]) * 256 * tail[0] * tail[1]]
                    .view(-1, 256, *tail) for half in halves)  # fmt: skip
            used = torch.full((rows,), context, dtype=torch.int32, device="cuda")
            per_row = context // 256
            tables = [torch.randint(len(k), (rows, per_row)).int().cuda() for _ in range(copies)]
            yield "flash", [
                lambda t=t: varlen_attn(query, k, v, starts * queries, None, queries, context,
                                        seqused_k=used, block_table=t, **extra)
                for t in tables
            ]  # fmt: skip
            return
        size = rows * context
        fit = min(copies, halves[0].numel() // (size * tail[0] * tail[1]))
        pairs = [[half.view(-1, *tail)[n * size : (n + 1) * size] for half in halves]
                 for n in range(fit)]  # fmt: skip
        yield (
            "flash (contiguous)",
            [
                lambda k=k, v=v: varlen_attn(
                    query, k, v, starts * queries, starts * context, queries, context, **extra
                )
                for k, v in pairs
            ],
        )

    def tiles(self, cell: Cell) -> Iterator[tuple[Tile | WideTile, int | None]]:
        """What --sweep tries."""
        group = self.heads // self.kv_heads
        rows = max(16, 1 << (group - 1).bit_length())
        if cell.decode:
            splits = [None, 1, 2] if len(cell.rows) > 1 else [None, 16, 64]
            for n, warps, stages in itertools.product((32, 64, 128), (4, 8), (2, 3, 4)):
                for split in splits:
                    yield Tile(rows, n, warps, stages), split
        elif self.own_prefill:
            for n, stages in itertools.product((32, 64, 128), (2, 3)):
                yield Tile(64, n, 4, stages), None
                yield Tile(128, n, 8, stages), None
            for parts, stages in itertools.product((2, 3), (2, 3, 4)):
                registers = (240, 168) if parts == 2 else (160, 128)
                yield WideTile(parts, 64, stages, *registers), None
        else:
            for m, n, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
                yield Tile(m, n, warps, stages), None

    @property
    def own_prefill(self) -> bool:
        """Whether prefill runs in a kernel that only this GPU has."""
        launcher: Any = self.kernels.launcher
        found = launcher._variant(self.layer, self.dtype.itemsize, BLOCK).hopper is not None
        launcher._variants.clear()
        return found

    def portable(self) -> Tile:
        return prefill_tile(self.device.info.arch, self.dim, self.dtype.itemsize)

    def use(self, cell: Cell, tile: Tile | WideTile | None, splits: int | None) -> None:
        """Take this tile (None: the table's) and number of splits (None: the heuristic's)."""
        launcher: Any = self.kernels.launcher
        launcher.decode_override = tile if cell.decode else None
        own = self.own_prefill
        launcher.prefill_override = None if cell.decode or own else tile
        wide = isinstance(tile, WideTile)
        launcher.hopper_override = None if cell.decode or not own or wide else tile
        launcher.wide_override = tile if wide else None
        launcher._num_splits = splits
        launcher._variants.clear()

    def told(self, cell: Cell, seconds: float) -> str:
        """A time in the cell's own measure."""
        text = f"{seconds * 1e6:9.1f} us"
        if cell.decode:
            rate = cell.context * self.token_bytes / seconds
            return f"{text} {rate / 1e9:7.0f} GB/s {rate / self.copy_rate:5.1%} of copy"
        return f"{text} {4 * cell.pairs * self.heads * self.dim / seconds / 1e12:7.1f} TFLOP/s"

    def run(self, cell: Cell, budget: float) -> dict[str, Any]:
        batches, qkv = self.batches(cell), self.inputs(cell)
        error = self.error(batches[0], qkv)
        if error > LIMITS[self.dtype]:
            raise SystemExit(f"{cell.name}: WRONG: error {error:.2e}")
        own = self.seconds(self._calls(batches, qkv), budget)
        result: dict[str, Any] = {"cell": cell.name, "error": error, "seconds": own, "rivals": {}}
        line = f"{cell.name:24} {self.told(cell, own)}  error {error:.1e}"
        for name, calls in self.rivals(cell, qkv[0], len(batches)):
            try:
                took = self.seconds(calls, budget / 2)
            except (RuntimeError, TypeError) as problem:
                line += f"  {name}: {str(problem).splitlines()[0][:60]}"
                continue
            result["rivals"][name] = took
            line += f"  {name} {took * 1e6:.1f} us ({took / own:.2f}x)"
        if not cell.decode and self.own_prefill:
            for name, field, tile in (("narrow", "hopper_override", hopper_tile(self.dim)),
                                      ("portable", "prefill_override", self.portable())):  # fmt: skip
                setattr(self.kernels.launcher, field, tile)
                self.kernels.launcher._variants.clear()
                took = self.seconds(self._calls(batches, qkv), budget)
                setattr(self.kernels.launcher, field, None)
                result["rivals"][name] = took
                line += f"  {name} {took * 1e6:.1f} us ({took / own:.2f}x)"
            self.kernels.launcher._variants.clear()
        if cell.decode:
            result["of_copy"] = cell.context * self.token_bytes / own / self.copy_rate
        print(line, flush=True)
        return result

    def sweep(self, cell: Cell, budget: float, deadline: float) -> None:
        """Try tiles until the deadline (perf_counter) and print the best."""
        batches, qkv = self.batches(cell), self.inputs(cell)
        found = []
        for tile, splits in self.tiles(cell):
            if time.perf_counter() > deadline:
                print("    stopped: the time is over (--limit)", flush=True)
                break
            self.use(cell, tile, splits)
            try:
                error = self.error(batches[0], qkv)
                took = self.seconds(self._calls(batches, qkv), budget)
            except Exception as problem:  # noqa: BLE001 - too large for the device: told, not fatal
                print(f"    {tile}: {str(problem).splitlines()[0][:80]}", flush=True)
                continue
            if error > LIMITS[self.dtype]:
                raise SystemExit(f"{cell.name}: {tile} is WRONG: error {error:.2e}")
            found.append((took, tile, splits))
        self.use(cell, None, None)
        table = self.seconds(self._calls(batches, qkv), budget)
        print(f"{cell.name:24} table {self.told(cell, table)}", flush=True)
        for took, tile, splits in sorted(found, key=lambda entry: entry[0])[:5]:
            shape = f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}"
            if isinstance(tile, WideTile):
                shape = f"{tile.parts}x{shape}"
            print(
                f"    {shape:16} splits {splits or 'auto'!s:5} {self.told(cell, took)}", flush=True
            )

    def _calls(self, batches: list[StepBatch], qkv: tuple[Tensor, Tensor, Tensor]) -> list[Call]:
        return [lambda b=b: self.kernels.attend(*qkv, self.pool, self.layer, b) for b in batches]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Options that say what is attended to."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0] if doc else "")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="a cell")
    parser.add_argument("--cells", default="", help="only cells whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="try tiles and splits, print the best")
    parser.add_argument("--limit", type=float, default=110.0, help="seconds; later cells are left")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    started = time.perf_counter()
    bench = Bench(options)
    print(bench.headline(options.dtype))
    results = []
    with torch.inference_mode():
        for cell in (cell for cell in CELLS if options.cells in cell.name):
            need = sum(-(-context // BLOCK) for _, context in cell.rows)
            if need > bench.pool.num_blocks:
                print(f"{cell.name:24} left out: needs {need} blocks")
            elif time.perf_counter() - started > options.limit:
                print(f"{cell.name:24} left out: {options.limit:.0f} s are over (--limit)")
            elif options.sweep:
                bench.sweep(cell, 0.02, started + options.limit)
            else:
                results.append(bench.run(cell, options.seconds))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"copy_bytes_per_second": bench.copy_rate, "cells": results}, file, indent=1)


if __name__ == "__main__":
    main()
