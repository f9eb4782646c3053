"""Decode of rows that share their first keys: what reading these once for all of them costs and saves.

Usage: python benchmarks/gpu_shared_rows.py [--heads 32] [--kv-heads 8] [--dim 128] [--own 64 128] [--sweep]

Each cell: rows that have `shared` keys in common and some of their own, as after some steps of a
prompt that many send. Checked against fp64 first. `alone`: every row reads all of its keys. `of copy`:
own keys and the shared ones, read once, over the time, as a share of what a copy of a large tensor
reaches in the same run; `arithmetic`: both products, in TFLOP/s. --sweep tries tiles and splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_attention import BLOCK, LIMITS, Bench, Cell, parser_of

from halyard.hal.kernels.triton.tiles import Tile, WideTile
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

        def one(own: tuple[int, int, int], words: str) -> None:
            launcher._variants.clear()
            launcher.decode_override = Tile(rows, *own)
            try:
                tried.append((seconds(), f"{words}, own {own}"))
            except Exception as problem:  # noqa: BLE001 - too large for the device: told, not fatal
                print(f"    {words}, own {own}: {str(problem).splitlines()[0][:80]}", flush=True)

        kinds: list[tuple[str, str, Tile | WideTile]] = []
        if group in (4, 8):
            kinds += [("hopper_shared_override", f"hopper s{stages}", Tile(16 * group, 64, group, stages))
                      for stages in (2, 3, 4)]  # fmt: skip
        if group in (4, 8) and self.dim == 128:
            kinds += [("wide_shared_override", f"wide {shape}", WideTile(2, *shape))
                      for shape in ((64, 2, 160, 112), (64, 3, 160, 120), (64, 4, 160, 120))]  # fmt: skip
        kinds += [("shared_override", f"portable s{stages}", Tile(rows, 64, 4, stages))
                  for stages in (2, 3)]  # fmt: skip
        owns = ((64, 2, 2), (64, 4, 2), (32, 1, 2), (32, 2, 2), (32, 4, 2), (32, 2, 3), (16, 1, 3), (16, 1, 4))  # fmt: skip
        for kind, words, tile in kinds:
            setattr(launcher, kind, tile)
            launcher.shared_splits = 2
            for own in owns if "s3" not in words and "s4" not in words else owns[3:4]:
                one(own, words)
            launcher.early = False
            one(owns[3], f"{words}, not early")
            launcher.early = had_early
            for splits in (1, 3, 4):
                launcher.shared_splits = splits
                one(owns[3], f"{words}, {splits} splits")
            setattr(launcher, kind, None)
        launcher.decode_override = launcher.shared_splits = None
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
