"""Hopper's prefill kernel for long prompts, its Python run on torch tensors: who waits for whom, places, masks."""

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

import gluon_in_python
from gluon_in_python import Boxes, in_python
from prefill_problem import ROWS, problem, shaped

from halyard.hal import fallbacks
from halyard.hal.kernels.triton import hopper_online, hopper_parts, hopper_wide
from halyard.hal.kernels.triton.launch import LOG2E, Shape, _hopper_module
from halyard.hal.kernels.triton.tiles import WideTile, wide_tile

pytestmark = pytest.mark.usefixtures("one_thread")


def attend(
    shape: Shape, tile: WideTile, rows: list[tuple[int, int]], late: bool, skip_single: bool = False
) -> tuple[Any, Any]:
    """(what the kernel gives, what attention in fp64 does); rows that it leaves out are NaN in both."""
    given = problem(shape, rows, skip_single)
    q, out = given.q, torch.full_like(given.q, float("nan"))
    grid = (len(q) // shape.tokens(tile) + len(rows), shape.heads_per_row(tile))
    with in_python(late, hopper_wide, hopper_parts, hopper_online) as run:
        run(
            "hopper_wide_kernel", grid, q, Boxes(given.pool.view(-1, shape.head_dim), 16, 64), out,
            given.tables, given.lengths, given.starts, given.scale * LOG2E, len(rows),
            q.stride(0), q.stride(1), given.tables.stride(0),
            **shape.wide_constants(tile), SKIP_SINGLE=skip_single, num_warps=tile.num_warps,
        )  # fmt: skip
    return out, given.truth


@pytest.mark.parametrize("late", [False, True], ids=["at_once", "late"])
@pytest.mark.parametrize("rows", list(ROWS))
@pytest.mark.parametrize("dim", [64, 128])
def test_rows(dim: int, rows: str, late: bool) -> None:
    tile = wide_tile(128)
    assert tile is not None
    for skip_single in (False, True):
        out, truth = attend(shaped(dim=dim), tile, ROWS[rows], late, skip_single)
        torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize(("parts", "stages"), [(2, 2), (3, 3), (3, 4)])
def test_blocks_and_stages(block: int, parts: int, stages: int) -> None:
    for width in (64, 128):
        tile = WideTile(parts, width, stages, 160, 128)
        out, truth = attend(shaped(block=block), tile, [(9, 700), (70, 70)], late=True)
        torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (5, 1), (12, 4), (71, 1), (80, 1)])
def test_groups(heads: int, kv_heads: int) -> None:
    tile = WideTile(3, 64, 2, 160, 128)
    out, truth = attend(shaped(heads, kv_heads), tile, [(1, 40), (67, 140)], late=True)
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_the_stand_in_sees_copies_that_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are written over while they are read."""
    copy = hopper_wide.copy_keys
    empty = [copy.arg_names.index(name) for name in ("k_empty", "v_empty")]
    always = SimpleNamespace(land=lambda: None, passed=lambda parity: True)

    def hasty(*arguments: Any) -> Any:
        given = list(arguments)
        for place in empty:
            given[place] = SimpleNamespace(index=lambda slot: always)
        return copy.fn(*given)

    def wrong() -> bool:
        try:
            out, truth = attend(shaped(), WideTile(2, 64, 2, 160, 128), [(30, 900)], late=True)
        except AssertionError:
            return True
        return not torch.allclose(out, truth, atol=1e-5, rtol=1e-5, equal_nan=True)

    assert not wrong()
    monkeypatch.setattr(gluon_in_python, "PATIENCE", 0.5)
    monkeypatch.setattr(hopper_wide, "copy_keys", SimpleNamespace(fn=hasty))
    assert any(wrong() for _ in range(8))  # threads: a race may be won


def test_a_triton_without_what_it_needs_is_a_fallback_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _hopper_module("hopper_wide", "sm_90") is hopper_wide
    before = fallbacks.counts().get("hopper_wide_kernel", 0)
    for module in (hopper_wide, hopper_parts):
        monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delattr(hopper_wide.gl.shared_memory_descriptor, "_reinterpret")
    assert _hopper_module("hopper_wide", "sm_90") is None
    assert fallbacks.counts()["hopper_wide_kernel"] == before + 1
