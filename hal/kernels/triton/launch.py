"""From a layer and a batch to launches: which kernel, which tile, how many splits."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halyard.hal import fallbacks
from halyard.hal.contract import Device
from halyard.hal.kernels.triton.gated import boxes
from halyard.hal.kernels.triton.tiles import (
    Tile,
    WideTile,
    after_tile,
    decode_tile,
    family,
    hopper_shared_tile,
    hopper_tile,
    hopper_wide_shared_tile,
    prefill_tile,
    shared_room,
    shared_tile,
    wide_tile,
)
from halyard.hal.types import AttentionLayer, SharedRows, StepBatch

__all__ = ["AttentionLauncher", "Shape", "pad"]

LOG2E = 1.4426950408889634

# Mixed batches: up to this length a decode row is done sooner than a second launch pays.
_SEPARATE_DECODE_KEYS = 256
# The kernel for long prompts: with fewer queries a row on average, most of its warps would be idle.
_WIDE_QUERIES = 64
# A kernel may begin before the one in front of it ends.
_EARLY_LAUNCHES = ("sm_90", "sm_100", "sm_120")
# Shared keys by two warpgroups: with 64 rows it took as long as one warpgroup (gpu_shared_rows.py).
_WIDE_ROWS = 128
# 16 query heads of one kv head took up to 2.6 times as long as each row alone (gpu_shared_rows.py).
_SHARED_GROUP = 8


def pad(number: int, least: int = 16) -> int:
    """The next power of two, at least `least`: sides of matrix tiles."""
    return max(least, 1 << (number - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Shape:
    """What the compiled variant of a kernel depends on. Each field is a constant of the kernel."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    item_size: int
    window: bool
    softcap: bool
    sinks: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def plain(self) -> bool:
        """Causal attention over 16-bit heads, and nothing else."""
        return self.item_size == 2 and not (self.window or self.softcap or self.sinks)

    @property
    def dim_pad(self) -> int:
        return pad(self.head_dim)

    def group_tile(self, tile: Tile | WideTile) -> int:
        """Heads of a group that one program takes."""
        return min(self.group, tile.block_m)

    def heads_per_row(self, tile: Tile | WideTile) -> int:
        """Programs a row (or a tile of queries) needs: kv heads times tiles of their group."""
        return self.num_kv_heads * -(-self.group // self.group_tile(tile))

    def tokens(self, tile: Tile | WideTile) -> int:
        """Tokens that one program of a prefill takes."""
        parts = tile.parts if isinstance(tile, WideTile) else 1
        return parts * (tile.block_m // self.group_tile(tile))

    def rows(self, tile: WideTile) -> int:
        """Rows that one program for shared keys takes."""
        return tile.parts * tile.block_m // pad(self.group, 1)

    def constants(self, tile: Tile) -> dict[str, Any]:
        """The constants that decode and prefill share."""
        return {
            "GROUP": self.group,
            "GROUP_TILE": self.group_tile(tile),
            "KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "DIM_PAD": self.dim_pad,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "HAS_WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "SINKS": self.sinks,
        }

    def hopper_constants(self, tile: Tile) -> dict[str, Any]:
        """The constants of Hopper's prefill kernel."""
        return {
            "GROUP": self.group,
            "GROUP_TILE": self.group_tile(tile),
            "KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "AHEAD": tile.num_stages - 1,
        }

    def wide_constants(self, tile: WideTile) -> dict[str, Any]:
        """The constants of Hopper's prefill kernel for long prompts."""
        return {
            "GROUP": self.group,
            "GROUP_TILE": self.group_tile(tile),
            "KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "STAGES": tile.num_stages,
            "PARTS": tile.parts,
            "REGISTERS": tile.registers,
        }

    def shared_constants(self, tile: Tile) -> dict[str, Any]:
        """The constants of the kernel for shared keys."""
        own = {"DIM_PAD": self.dim_pad, "SOFTCAP": self.softcap}
        return self._shared_rows(tile) | own

    def hopper_shared_constants(self, tile: Tile) -> dict[str, Any]:
        """The constants of Hopper's kernel for shared keys."""
        return self._shared_rows(tile) | {"AHEAD": tile.num_stages - 1}

    def wide_shared_constants(self, tile: WideTile) -> dict[str, Any]:
        """The constants of Hopper's kernel for shared keys of many rows."""
        return self._shared_rows(tile) | {
            "BLOCK_M": tile.block_m,
            "STAGES": tile.num_stages,
            "REGISTERS": tile.registers,
        }

    def _shared_rows(self, tile: Tile | WideTile) -> dict[str, Any]:
        """What all of them have."""
        return {
            "GROUP": self.group,
            "GROUP_PAD": pad(self.group, 1),
            "ROWS": SharedRows.WIDTH,
            "KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_N": tile.block_n,
        }


@dataclass(frozen=True, slots=True)
class _Variant:
    """A shape with its tiles and constants, looked up once."""

    shape: Shape
    decode: Tile
    prefill: Tile
    decode_constants: dict[str, Any]
    prefill_constants: dict[str, Any]
    after: Tile  # of decode that goes on from shared keys
    after_constants: dict[str, Any]
    hopper: Tile | None  # prefill goes to Hopper's own kernel
    wide: WideTile | None  # or, with long prompts, to that one
    hopper_shared: Tile | None  # and so do shared keys
    wide_shared: WideTile | None  # or, of many rows, to that one


class AttentionLauncher:
    """Launches writes and attention on one device's current stream; owns the split workspace."""

    def __init__(self, device: Device, num_splits: int | None = None) -> None:
        self._arch = device.info.arch
        self._cores = device.info.num_cores
        self._num_splits = num_splits
        self._variants: dict[Shape, _Variant] = {}
        self._workspace: Tensor | None = None
        self._outgrown: list[Tensor] = []  # captured steps still write to them
        self._decode = importlib.import_module("halyard.hal.kernels.triton.decode")
        self._prefill = importlib.import_module("halyard.hal.kernels.triton.prefill")
        self._shared = importlib.import_module("halyard.hal.kernels.triton.shared")
        self._write = importlib.import_module("halyard.hal.kernels.triton.write")
        self._hopper = _hopper_module("hopper", self._arch)
        self._hopper_wide = _hopper_module("hopper_wide", self._arch)
        self._hopper_shared = _hopper_module("hopper_shared", self._arch)
        self._hopper_wide_shared = _hopper_module("hopper_wide_shared", self._arch)
        self.early = family(self._arch) in _EARLY_LAUNCHES
        # Tiles to try instead of the tables' (benchmarks).
        self.decode_override: Tile | None = None
        self.prefill_override: Tile | None = None
        self.hopper_override: Tile | None = None  # and no wide kernel then
        self.wide_override: WideTile | None = None
        self.shared_override: Tile | None = None
        self.hopper_shared_override: Tile | None = None  # and no wide kernel then
        self.wide_shared_override: WideTile | None = None
        self.shared_splits: int | None = None

    def write(self, k: Tensor, v: Tensor, data: Tensor, slot_mapping: Tensor) -> None:
        """k, v [tokens, kv_heads, dim] to their slots of one layer [blocks, 2, heads, size, dim]."""
        tokens, heads, dim = k.shape
        if not tokens:
            return
        dim_pad = pad(dim)
        tile = min(pad(heads, 1), max(1, 4096 // dim_pad))
        self._write.kv_write_kernel[(tokens, -(-heads // tile))](
            k, v, data, slot_mapping, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            KV_HEADS=heads, HEAD_DIM=dim, DIM_PAD=dim_pad, BLOCK_SIZE=data.shape[3],
            HEADS_TILE=tile, num_warps=4,
        )  # fmt: skip

    def attend(self, q: Tensor, data: Tensor, layer: AttentionLayer, batch: StepBatch) -> Tensor:
        """Attention of all rows over one layer [blocks, 2, heads, size, dim]; returns the output."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if not batch.num_tokens:
            return out
        variant = self._variant(layer, q.element_size(), data.shape[3])
        if batch.max_query_len == 1:
            self._run_decode(q, data, out, layer, batch, variant)
            return out
        # Which rows have one query is known on the device only: each kernel leaves the other's.
        separate = batch.num_rows > 1 and batch.max_seq_len > _SEPARATE_DECODE_KEYS
        self._run_prefill(q, data, out, layer, batch, variant, separate)
        if separate:  # as multiprocessors have no prompts left
            self._run_decode(q, data, out, layer, batch, variant, beside=self.early)
        return out

    def splits(self, layer: AttentionLayer, batch: StepBatch, variant: _Variant) -> int:
        """Programs that share a decode row's keys: from shapes alone, never from data."""
        if self._num_splits is not None:
            return self._num_splits
        tile, keys = variant.decode, batch.max_seq_len
        if layer.window:
            keys = min(keys, layer.window + tile.block_n)
        heads = variant.shape.heads_per_row(tile)
        chosen: int = self._decode.choose_splits(
            batch.num_rows, heads, keys, tile.block_n, self._cores
        )
        return chosen

    def _variant(self, layer: AttentionLayer, item_size: int, block_size: int) -> _Variant:
        shape = Shape(
            layer.num_heads, layer.num_kv_heads, layer.head_dim, block_size, item_size,
            layer.window > 0, layer.softcap > 0, layer.sinks is not None,
        )  # fmt: skip
        found = self._variants.get(shape)
        if found is None:
            decode = self.decode_override or decode_tile(
                self._arch, shape.dim_pad, item_size, shape.group
            )
            after = self.decode_override or after_tile(
                self._arch, shape.dim_pad, item_size, shape.group
            )
            prefill = self.prefill_override or prefill_tile(self._arch, shape.dim_pad, item_size)
            hopper = None
            if self._hopper is not None and shape.plain and self.prefill_override is None:
                hopper = self.hopper_override or hopper_tile(shape.head_dim)
            wide = None
            if self._hopper_wide is not None and hopper is not None and not self.hopper_override:
                wide = self.wide_override or wide_tile(shape.head_dim)
            hopper_shared, half = None, item_size == 2 and not shape.softcap
            rows = SharedRows.WIDTH * pad(shape.group, 1)
            if self._hopper_shared is not None and half and self.shared_override is None:
                hopper_shared = self.hopper_shared_override or hopper_shared_tile(
                    shape.head_dim, rows
                )
            wide_shared = None
            shares = hopper_shared is not None and not self.hopper_shared_override
            if self._hopper_wide_shared is not None and shares:
                wide_shared = self.wide_shared_override or hopper_wide_shared_tile(
                    shape.head_dim, rows
                )
            found = _Variant(
                shape,
                decode,
                prefill,
                shape.constants(decode),
                shape.constants(prefill),
                after,
                shape.constants(after),
                hopper,
                wide,
                hopper_shared,
                wide_shared,
            )
            self._variants[shape] = found
        return found

    def _run_decode(
        self, q: Tensor, data: Tensor, out: Tensor, layer: AttentionLayer, batch: StepBatch,
        variant: _Variant, beside: bool = False,
    ) -> None:  # fmt: skip
        shape, tile = variant.shape, variant.decode
        own = self.splits(layer, batch, variant)
        shared = batch.shared if self._can_share(layer, shape, batch) else None
        more = 0
        if shared is not None:  # as many splits as fill the chip, if all keys were shared
            more = self.shared_splits or self._splits_of_shared(shape, batch, variant)
        # What is shared comes first: where a row's own keys are not split, they go on from that.
        split, splits = own > 1, more + (own if own > 1 else 0)
        sinks = out if layer.sinks is None else layer.sinks
        partial, lse = out, out
        if splits:
            partial, lse = self._take_workspace(batch.num_rows, splits, shape, q.device)
        if shared is not None:
            self._run_shared(
                q, data, partial, lse, layer, batch, shared, variant, splits - more, splits
            )
        constants = variant.decode_constants
        if shared is not None and not split:
            tile, constants = variant.after, variant.after_constants
        early = {"launch_pdl": True} if self.early else {}
        grid = (batch.num_rows, shape.heads_per_row(tile), own)
        tables = batch.block_tables
        self._decode.paged_decode_kernel[grid](
            q, data, out, partial, lse, tables, batch.seq_lens, batch.query_start, sinks,
            *_scales(layer), layer.window, q.stride(0), q.stride(1), tables.stride(0),
            batch.seq_lens if shared is None else shared.row_keys, splits,
            **constants, SPLIT=split, SHARED=shared is not None, EARLY=self.early, BESIDE=beside,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            **(early if shared is not None or beside else {}),
        )  # fmt: skip
        if split:
            self._decode.merge_kernel[(batch.num_rows, shape.num_heads)](
                out, partial, lse, batch.query_start, sinks, splits,
                HEADS=shape.num_heads, HEAD_DIM=shape.head_dim, DIM_PAD=shape.dim_pad,
                SPLITS_PAD=pad(splits, 4), SINKS=shape.sinks, EARLY=self.early, num_warps=4, **early,
            )  # fmt: skip

    def _splits_of_shared(self, shape: Shape, batch: StepBatch, variant: _Variant) -> int:
        rows, room = SharedRows.WIDTH, {}
        wide = self._takes_wide_shared(batch, variant)
        if wide is not None:
            rows, room = shape.rows(wide), {"per_core": 1}
        chosen: int = self._decode.choose_splits(
            -(-batch.num_rows // rows), shape.num_kv_heads, batch.max_seq_len,
            variant.decode.block_n, self._cores, **room,
        )  # fmt: skip
        return chosen

    def _takes_wide_shared(self, batch: StepBatch, variant: _Variant) -> WideTile | None:
        return variant.wide_shared if batch.num_rows >= _WIDE_ROWS else None

    def _run_shared(
        self, q: Tensor, data: Tensor, partial: Tensor, lse: Tensor, layer: AttentionLayer,
        batch: StepBatch, shared: SharedRows, variant: _Variant, own: int, splits: int,
    ) -> None:  # fmt: skip
        """The keys that tiles of rows have in common, to the splits after `own`."""
        shape, tables = variant.shape, batch.block_tables
        grid = (len(shared.tile_keys), shape.num_kv_heads, splits - own)
        hopper, wide = variant.hopper_shared, self._takes_wide_shared(batch, variant)
        if wide is not None:
            grid = (shared.tile_rows.numel() // shape.rows(wide), *grid[1:])
            self._hopper_wide_shared.hopper_wide_shared_kernel[grid](
                q, boxes(data.view(-1, shape.head_dim), 16, 64), partial, lse, tables,
                batch.query_start, shared.tile_rows, shared.tile_keys, _scales(layer)[0],
                q.stride(0), q.stride(1), tables.stride(0), splits, own,
                **shape.wide_shared_constants(wide), num_warps=wide.num_warps,
                maxnreg=wide.most_registers,
            )  # fmt: skip
            return
        if hopper is not None:
            self._hopper_shared.hopper_shared_kernel[grid](
                q, data, partial, lse, tables, batch.query_start, shared.tile_rows, shared.tile_keys,
                _scales(layer)[0], q.stride(0), q.stride(1), tables.stride(0), splits, own,
                **shape.hopper_shared_constants(hopper), num_warps=hopper.num_warps,
            )  # fmt: skip
            return
        tile = self.shared_override or shared_tile(
            self._arch, shape.dim_pad, shape.item_size, shape.group
        )
        self._shared.shared_decode_kernel[grid](
            q, data, partial, lse, tables, batch.query_start, shared.tile_rows, shared.tile_keys,
            *_scales(layer), q.stride(0), q.stride(1), tables.stride(0), splits, own,
            **shape.shared_constants(tile), EARLY=self.early,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def _can_share(self, layer: AttentionLayer, shape: Shape, batch: StepBatch) -> bool:
        """Whether tiles of rows read shared keys together: no window, the tile has room, and it pays. A
        large group fills a matrix tile by itself, and one kv head's keys stay in the cache for all rows.
        """
        sums = SharedRows.WIDTH * pad(shape.group, 1) * shape.dim_pad
        alone = batch.max_query_len > 1 or layer.window > 0 or shape.group > _SHARED_GROUP
        return not alone and sums <= shared_room(self._arch)

    def _run_prefill(
        self, q: Tensor, data: Tensor, out: Tensor, layer: AttentionLayer, batch: StepBatch,
        variant: _Variant, skip_single: bool,
    ) -> None:  # fmt: skip
        shape, tables = variant.shape, batch.block_tables
        if variant.wide is not None and self._takes_wide(shape, variant.wide, batch):
            self._run_wide(q, data, out, layer, batch, shape, variant.wide, skip_single)
            return
        tile = variant.hopper or variant.prefill
        grid = self._prefill_grid(shape, tile, batch)
        if self._hopper is not None and variant.hopper is not None:
            self._hopper.hopper_prefill_kernel[grid](
                q, data, out, tables, batch.seq_lens, batch.query_start, _scales(layer)[0],
                batch.num_rows, q.stride(0), q.stride(1), tables.stride(0),
                **shape.hopper_constants(tile), SKIP_SINGLE=skip_single, num_warps=tile.num_warps,
            )  # fmt: skip
            return
        self._prefill.paged_prefill_kernel[grid](
            q, data, out, tables, batch.seq_lens, batch.query_start,
            out if layer.sinks is None else layer.sinks,
            *_scales(layer), layer.window, batch.num_rows,
            q.stride(0), q.stride(1), tables.stride(0),
            **variant.prefill_constants, SKIP_SINGLE=skip_single, EARLY=self.early,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def _prefill_grid(
        self, shape: Shape, tile: Tile | WideTile, batch: StepBatch
    ) -> tuple[int, int]:
        return batch.num_tokens // shape.tokens(tile) + batch.num_rows, shape.heads_per_row(tile)

    def _takes_wide(self, shape: Shape, tile: WideTile, batch: StepBatch) -> bool:
        """Whether there are queries for all of its warps, and programs for all multiprocessors."""
        programs = batch.num_tokens // shape.tokens(tile) * shape.heads_per_row(tile)
        return batch.num_tokens >= _WIDE_QUERIES * batch.num_rows and programs >= self._cores

    def _run_wide(
        self, q: Tensor, data: Tensor, out: Tensor, layer: AttentionLayer, batch: StepBatch,
        shape: Shape, tile: WideTile, skip_single: bool,
    ) -> None:  # fmt: skip
        self._hopper_wide.hopper_wide_kernel[self._prefill_grid(shape, tile, batch)](
            q, boxes(data.view(-1, shape.head_dim), 16, 64), out, batch.block_tables, batch.seq_lens,
            batch.query_start, _scales(layer)[0], batch.num_rows,
            q.stride(0), q.stride(1), batch.block_tables.stride(0),
            **shape.wide_constants(tile), SKIP_SINGLE=skip_single,
            num_warps=tile.num_warps, maxnreg=tile.most_registers,
        )  # fmt: skip

    def _take_workspace(
        self, rows: int, splits: int, shape: Shape, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """fp32 parts [rows, heads, splits, dim_pad] and their log-sum-exp [rows, heads, splits]."""
        count = rows * shape.num_heads * splits
        need = count * (shape.dim_pad + 1)
        if self._workspace is None or self._workspace.numel() < need:
            if self._workspace is not None:
                self._outgrown.append(self._workspace)
            self._workspace = torch.empty(pad(need), dtype=torch.float32, device=device)
        parts = count * shape.dim_pad
        return self._workspace[:parts], self._workspace[parts:need]


def _hopper_module(name: str, arch: str) -> Any:
    """A module of Hopper's own kernels, where the GPU is one and Triton's Gluon has what they need."""
    if family(arch) != "sm_90":
        return None
    try:
        return importlib.import_module(f"halyard.hal.kernels.triton.{name}")
    except ImportError as error:
        fallbacks.note(f"{name}_kernel", f"one that does without it is taken: {error}")
        return None


def _scales(layer: AttentionLayer) -> tuple[float, float]:
    """What multiplies q.k, and what multiplies tanh of that: scores come out in base 2."""
    if layer.softcap:
        return layer.scale / layer.softcap, layer.softcap * LOG2E
    return layer.scale * LOG2E, 1.0
