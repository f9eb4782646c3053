"""Hopper's prefill kernel, its Python run on torch tensors: places, masks, order of copies and products."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

from gluon_in_python import in_python

from halyard.hal import fallbacks
from halyard.hal.kernels.triton import hopper, hopper_online
from halyard.hal.kernels.triton.launch import Shape, _hopper_module
from halyard.hal.kernels.triton.tiles import Tile, hopper_tile

ROWS: dict[str, list[tuple[int, int]]] = {  # (queries, context with them)
    "whole prompts": [(1, 1), (15, 15), (64, 64), (65, 65), (150, 150)],
    "chunks": [(7, 500), (64, 256), (33, 191), (16, 193)],
    "mixed": [(1, 300), (40, 90), (1, 17), (0, 30), (20, 20)],
}


pytestmark = pytest.mark.usefixtures("one_thread")


def attend(
    shape: Shape, tile: Tile, rows: list[tuple[int, int]], late: bool, skip_single: bool = False
) -> tuple[Any, Any]:
    """(what the kernel gives, what attention in fp64 does); rows that it leaves out are NaN in both."""
    torch.manual_seed(0)
    heads, kv_heads, dim, block = (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
    )
    needs = [-(-context // block) for _, context in rows]
    blocks = sum(needs) + 3
    pool = torch.full((blocks, 2, kv_heads, block, dim), float("nan"))
    order = torch.randperm(blocks).tolist()
    width = max(needs) + 2
    tables = torch.full((len(rows), width), -1, dtype=torch.int32)
    tokens = sum(queries for queries, _ in rows)
    q = torch.randn(tokens + 5, heads, dim)  # tokens without a row fill up a recorded step
    truth = torch.full_like(q, float("nan"))
    starts, scale = [0], dim**-0.5
    for row, (queries, context) in enumerate(rows):
        own = [order.pop() for _ in range(needs[row])]
        tables[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        keys, values = torch.randn(2, context, kv_heads, dim).unbind()
        for position in range(context):
            slot = own[position // block], slice(None), position % block
            pool[slot[0], 0, :, slot[2]] = keys[position]
            pool[slot[0], 1, :, slot[2]] = values[position]
        starts.append(starts[-1] + queries)
        if not queries or (skip_single and queries == 1):
            continue
        wide = [x.double().repeat_interleave(shape.group, 1) for x in (keys, values)]
        scores = torch.einsum("qhd,khd->hqk", q[starts[-2] : starts[-1]].double(), wide[0]) * scale
        seen = torch.arange(context)[None] <= torch.arange(context - queries, context)[:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        truth[starts[-2] : starts[-1]] = torch.einsum("hqk,khd->qhd", weights, wide[1]).float()
    out = torch.full_like(q, float("nan"))
    lengths = torch.tensor([context for _, context in rows], dtype=torch.int32)
    per_tile = tile.block_m // shape.group_tile(tile)
    grid = (len(q) // per_tile + len(rows), shape.heads_per_row(tile))
    with in_python(late, hopper, hopper_online) as run:
        run(
            "hopper_prefill_kernel", grid, q, pool, out, tables, lengths,
            torch.tensor(starts, dtype=torch.int32), scale * 1.4426950408889634, len(rows),
            heads * dim, dim, width, **shape.hopper_constants(tile), SKIP_SINGLE=skip_single,
            num_warps=tile.num_warps,
        )  # fmt: skip
    return out, truth


def shaped(heads: int = 8, kv_heads: int = 2, dim: int = 64, block: int = 16) -> Shape:
    return Shape(heads, kv_heads, dim, block, 2, False, False, False)


@pytest.mark.parametrize("late", [False, True], ids=["at_once", "late"])
@pytest.mark.parametrize("rows", list(ROWS))
@pytest.mark.parametrize("dim", [64, 128])
def test_rows(dim: int, rows: str, late: bool) -> None:
    tile = hopper_tile(dim)
    assert tile is not None
    for skip_single in (False, True):
        out, truth = attend(shaped(dim=dim), tile, ROWS[rows], late, skip_single)
        torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_blocks_and_stages(block: int, stages: int) -> None:
    for width in (32, 64):
        tile = Tile(64, width, 4, stages)
        out, truth = attend(shaped(block=block), tile, [(9, 700), (70, 70)], late=True)
        torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (5, 1), (12, 4), (71, 1), (80, 1)])
def test_groups(heads: int, kv_heads: int) -> None:
    tile = Tile(64, 64, 4, 2)
    out, truth = attend(shaped(heads, kv_heads), tile, [(1, 40), (67, 140)], late=True)
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_the_stand_in_sees_a_wait_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a turn that takes more to be under way than there is, tiles are read before they landed."""
    fold, ahead = hopper_online._fold_tile, 24  # the argument AHEAD
    assert fold.arg_names[ahead] == "AHEAD"

    def hasty(*arguments: Any) -> Any:
        return fold.fn(*arguments[:ahead], arguments[ahead] + 1, *arguments[ahead + 1 :])

    def check() -> None:
        out, truth = attend(shaped(), Tile(64, 64, 4, 3), [(30, 700)], late=True)
        torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)

    check()
    monkeypatch.setattr(hopper_online, "_fold_tile", SimpleNamespace(fn=hasty))
    with pytest.raises((AssertionError, IndexError)):
        check()


def test_a_triton_without_what_it_needs_is_a_fallback_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _hopper_module("hopper", "sm_90") is hopper
    before = fallbacks.counts().get("hopper_kernel", 0)
    monkeypatch.setitem(sys.modules, hopper.__name__, None)
    assert _hopper_module("hopper", "sm_90") is None
    assert _hopper_module("hopper", "sm_80") is None  # that one has no such kernel: nothing to tell
    assert fallbacks.counts()["hopper_kernel"] == before + 1
