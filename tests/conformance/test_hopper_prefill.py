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
from prefill_problem import ROWS, problem, shaped

from halyard.hal import fallbacks
from halyard.hal.kernels.triton import hopper, hopper_online
from halyard.hal.kernels.triton.launch import LOG2E, Shape, _hopper_module
from halyard.hal.kernels.triton.tiles import Tile, hopper_tile

pytestmark = pytest.mark.usefixtures("one_thread")


def attend(
    shape: Shape, tile: Tile, rows: list[tuple[int, int]], late: bool, skip_single: bool = False
) -> tuple[Any, Any]:
    """(what the kernel gives, what attention in fp64 does); rows that it leaves out are NaN in both."""
    given = problem(shape, rows, skip_single)
    q, out = given.q, torch.full_like(given.q, float("nan"))
    grid = (len(q) // shape.tokens(tile) + len(rows), shape.heads_per_row(tile))
    with in_python(late, hopper, hopper_online) as run:
        run(
            "hopper_prefill_kernel", grid, q, given.pool, out, given.tables, given.lengths, given.starts,
            given.scale * LOG2E, len(rows), q.stride(0), q.stride(1), given.tables.stride(0),
            **shape.hopper_constants(tile), SKIP_SINGLE=skip_single, num_warps=tile.num_warps,
        )  # fmt: skip
    return out, given.truth


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
