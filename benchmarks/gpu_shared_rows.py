"""Decode of rows that share their first keys: what reading these once for all of them costs and saves.

Usage: python benchmarks/gpu_shared_rows.py [--heads 32] [--kv-heads 8] [--dim 128] [--own 64 128] [--sweep]

Each cell: rows that have `shared` keys in common and some of their own, as after some steps of a
prompt that many send. Checked against fp64 first. `alone`: every row reads all of its keys. `of copy`:
own keys and the shared ones, read once, over the time, as a share of what a copy of a large tensor
reaches in the same run; `arithmetic`: both products, in TFLOP/s. --sweep tries tiles and splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_attention import BLOCK, LIMITS, Bench, Cell, parser_of

from halyard.hal.kernels.triton.tiles import Tile
from halyard.hal.types import SharedRows, StepBatch
from halyard.runtime.shared_rows import find_shared_rows

SHAPES = [(256, 2048), (64, 2048), (256, 512), (256, 8192), (16, 8192)]


class SharedBench(Bench):
    """Batches whose rows have their first blocks in common."""

    def pairs(
        self, rows: int, prefix: int, own_keys: list[int]
    ) -> list[tuple[StepBatch, StepBatch]]:
        """(with what is shared told, and without) for a few sets of own blocks."""
        rng = np.random.default_rng(0)
        lengths = prefix + rng.integers(*own_keys, rows)
        cell = Cell("", tuple((1, int(length)) for length in lengths))
        found = []
        for batch in self.batches(cell)[:8]:
            batch.block_tables[1:, : prefix // BLOCK] = batch.block_tables[
                0, : prefix // BLOCK
            ].clone()
            tables = batch.block_tables.cpu().numpy()
            arrays = find_shared_rows(tables, lengths - 1, BLOCK)
            if arrays is None:
                raise SystemExit("these rows share nothing")
            shared = SharedRows(*(torch.from_numpy(array).cuda() for array in arrays))
            found.append((replace(batch, shared=shared), batch))
        return found

    def cell(self, rows: int, prefix: int, own_keys: list[int], sweep: bool) -> None:
        pairs = self.pairs(rows, prefix, own_keys)
        together, alone = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        qkv = self.inputs(Cell("", ((1, prefix + 1),) * rows))
        own = float(sum(int(batch.seq_lens.sum()) - rows * prefix for batch in alone) / len(alone))
        flops = 4 * self.heads * self.dim * (own + rows * prefix)

        def seconds(batches: list[StepBatch]) -> float:
            self.check(batches[0], qkv)
            return self.seconds(self._calls(batches, qkv), 0.05)

        took, apart = seconds(together), seconds(alone)
        rate = (own + prefix) * self.token_bytes / took
        print(f"{rows:4} rows, {prefix:5} shared: {took * 1e6:7.1f} us, {rate / self.copy_rate:5.1%} of copy, "
              f"{flops / took / 1e12:5.1f} TFLOP/s; alone {apart * 1e6:7.1f} us ({apart / took:.2f}x)",
              flush=True)  # fmt: skip
        if sweep:
            self.sweep_cell(lambda: seconds(together))

    def check(self, batch: StepBatch, qkv: Any) -> None:
        if (error := self.error(batch, qkv)) > LIMITS[self.dtype]:
            raise SystemExit(f"WRONG: error {error:.2e}")

    def sweep_cell(self, seconds: Callable[[], float]) -> None:
        launcher: Any = self.kernels.launcher
        group = 1 << (self.heads // self.kv_heads - 1).bit_length()
        rows = max(16, group)
        had_early = launcher.early
        tried: list[tuple[float, str]] = []

        def one(words: str) -> None:
            launcher._variants.clear()
            try:
                tried.append((seconds(), words))
            except Exception as problem:  # noqa: BLE001 - too large for the device: told, not fatal
                print(f"    {words}: {str(problem).splitlines()[0][:80]}", flush=True)

        for n, warps, stages in (
            (64, 4, 2),
            (64, 4, 3),
            (32, 4, 2),
            (32, 2, 2),
            (64, 2, 2),
            (128, 4, 2),
        ):
            launcher.decode_override = Tile(rows, n, warps, stages)
            one(f"own {n} w{warps} s{stages}")
        launcher.decode_override = None
        for early, splits in itertools.product((False, True), (1, 2, 3, 4)):
            launcher.early, launcher.shared_splits = early and had_early, splits
            tiles = ((64, 4, 2), (32, 4, 2), (64, 2, 2)) if group in (4, 8) else ()
            for stages, own in itertools.product((2, 3, 4), tiles):
                launcher.hopper_shared_override = Tile(16 * group, 64, group, stages)
                launcher.decode_override = Tile(rows, *own)
                one(f"hopper s{stages} splits {splits} own {own} early {early}")
            launcher.hopper_shared_override = launcher.decode_override = None
            for stages in (2, 3):
                launcher.shared_override = Tile(rows, 64, 4, stages)
                one(f"portable 64 w4 s{stages} splits {splits} early {early}")
            launcher.shared_override = None
        launcher.early = had_early
        launcher.shared_override = launcher.shared_splits = None
        launcher._variants.clear()
        for took, words in sorted(tried):
            print(f"    {took * 1e6:7.1f} us  {words}", flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--own", type=int, nargs=2, default=[64, 128], help="keys of a row's own")
    parser.add_argument("--sweep", action="store_true", help="try tiles and splits")
    options = parser.parse_args()
    bench = SharedBench(options)
    print(bench.headline(options.dtype))
    with torch.inference_mode():
        for rows, prefix in SHAPES:
            bench.cell(rows, prefix, options.own, options.sweep and rows == 256 and prefix == 2048)


if __name__ == "__main__":
    main()
