"""Hopper's kernels for shared keys, their Python run on torch tensors: places, masks, splits without keys."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

from gluon_in_python import Boxes, in_python

from halyard.hal.kernels.triton import (
    hopper_online,
    hopper_parts,
    hopper_shared,
    hopper_wide_shared,
)
from halyard.hal.kernels.triton.launch import Shape
from halyard.hal.kernels.triton.tiles import (
    Tile,
    WideTile,
    hopper_shared_tile,
    hopper_wide_shared_tile,
)
from halyard.hal.types import SharedRows

LOG2E = 1.4426950408889634
FIRST = 1  # splits of rows' own keys, which lie in front


pytestmark = pytest.mark.usefixtures("one_thread")


def check(
    shape: Shape, tile: Tile | WideTile, pairs: list[tuple[list[int], int]], splits: int, late: bool
) -> None:
    """Parts and their log-sum-exp, merged, against fp64; what isn't of a shared split stays.

    pairs of tiles: (rows, keys that they share); a pair without keys isn't used.
    """
    torch.manual_seed(0)
    heads, kv_heads, dim, block = (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
    )
    rows = 1 + max(row for members, _ in pairs for row in members)
    needs = [-(-keys // block) for _, keys in pairs]
    order = torch.randperm(sum(needs) + 3).tolist()
    pool = torch.full((len(order), 2, kv_heads, block, dim), float("nan"))
    tables = torch.full((rows, max(needs) + 2), -1, dtype=torch.int32)
    starts = torch.arange(3, 3 + rows + 1, dtype=torch.int32)  # tokens of others are in front
    q = torch.randn(int(starts[-1]), heads, dim)
    width = SharedRows.WIDTH
    tile_rows = torch.full((2 * len(pairs), width), -1, dtype=torch.int32)
    tile_keys = torch.zeros(2 * len(pairs), dtype=torch.int32)
    truth = torch.full((rows, heads, dim), float("nan"), dtype=torch.float64)
    lse_truth = torch.full((rows, heads), float("nan"), dtype=torch.float64)
    for number, ((members, keys), need) in enumerate(zip(pairs, needs, strict=True)):
        if not keys:
            continue
        own = [order.pop() for _ in range(need)]
        k, v = torch.randn(2, keys, kv_heads, dim).unbind()
        for position in range(keys):
            pool[own[position // block], 0, :, position % block] = k[position]
            pool[own[position // block], 1, :, position % block] = v[position]
        for part in range(0, len(members), width):
            some = torch.tensor(members[part : part + width], dtype=torch.int32)
            tile_rows[2 * number + part // width, : len(some)] = some
            tile_keys[2 * number + part // width] = keys
        for row in members:
            tables[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        wide = [x.double().repeat_interleave(shape.group, 1) for x in (k, v)]
        query = q[starts[members].long()].double()
        scores = torch.einsum("rhd,khd->rhk", query, wide[0]) * dim**-0.5
        lse_truth[members] = scores.logsumexp(-1)
        truth[members] = torch.einsum("rhk,khd->rhd", scores.softmax(-1), wide[1])
    partial = torch.full((rows, heads, FIRST + splits, dim), float("nan"))
    lse = torch.full((rows, heads, FIRST + splits), float("nan"))
    name, keys_of, tiles = "hopper_shared_kernel", pool, tile_rows.shape[0]
    if isinstance(tile, WideTile):
        name, keys_of = "hopper_wide_shared_kernel", Boxes(pool.view(-1, dim), 16, 64)
        constants = shape.wide_shared_constants(tile)
        tiles = tile_rows.numel() * constants["GROUP_PAD"] // (tile.parts * tile.block_m)
    else:
        constants = shape.hopper_shared_constants(tile)
    with in_python(late, hopper_shared, hopper_wide_shared, hopper_parts, hopper_online) as run:
        run(
            name, (tiles, kv_heads, splits), q, keys_of, partial, lse, tables, starts, tile_rows,
            tile_keys, dim**-0.5 * LOG2E, heads * dim, dim, tables.shape[1], FIRST + splits, FIRST,
            **constants, num_warps=tile.num_warps,
        )  # fmt: skip
    assert partial[:, :, :FIRST].isnan().all()
    assert lse[:, :, :FIRST].isnan().all()
    got, weights = merged(partial[:, :, FIRST:], lse[:, :, FIRST:])
    torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(weights, lse_truth, atol=1e-5, rtol=1e-5, equal_nan=True)


def merged(parts: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(sums, natural log-sum-exp) of splits whose log-sum-exp is in base 2."""
    total = (lse.double() / LOG2E).logsumexp(-1)
    weights = torch.exp(lse.double() / LOG2E - total[..., None])
    return (parts.double() * weights[..., None]).sum(2), total


def shaped(heads: int = 8, kv_heads: int = 2, dim: int = 64, block: int = 16) -> Shape:
    return Shape(heads, kv_heads, dim, block, 2, False, False, False)


PAIRS: dict[str, list[tuple[list[int], int]]] = {
    "one tile": [(list(range(16)), 512)],
    "a pair": [(list(range(32)), 512)],
    "few rows, few keys": [([2, 0], 16)],
    "two prefixes": [([5, 1, 3], 208), (list(range(6, 25)), 80)],
    "unused between": [([0, 1], 96), ([], 0), ([4, 2, 3], 336), ([], 0)],
}


@pytest.mark.parametrize("late", [False, True], ids=["at_once", "late"])
@pytest.mark.parametrize("pairs", list(PAIRS))
@pytest.mark.parametrize("dim", [64, 128])
def test_tiles(dim: int, pairs: str, late: bool) -> None:
    shape = shaped(dim=dim)
    for tile in (
        hopper_shared_tile(dim, SharedRows.WIDTH * shape.group),
        hopper_wide_shared_tile(128, SharedRows.WIDTH * shape.group),
    ):
        assert tile is not None
        for splits in (1, 2, 5):  # of five some have no keys
            check(shape, tile, PAIRS[pairs], splits, late)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_blocks_and_stages(block: int, stages: int) -> None:
    pairs = [([0, 2], 5 * 128), ([1, *range(3, 20)], 128)]
    for width in (32, 64):
        check(shaped(block=block), Tile(64, width, 4, stages), pairs, 3, late=True)
    for width in (64, 128):
        check(shaped(block=block), WideTile(2, width, stages, 160, 120), pairs, 3, late=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (8, 1), (10, 2), (14, 2)])
def test_groups(heads: int, kv_heads: int) -> None:
    shape = shaped(heads, kv_heads)
    tile = hopper_shared_tile(64, int(shape.hopper_shared_constants(Tile(0, 64, 4, 2))["GROUP_PAD"]) * 16)  # fmt: skip
    assert tile is not None
    pairs = [([3, 1], 160), ([0, 2, *range(4, 20)], 48)]
    check(shape, tile, pairs, 2, late=True)
    check(shape, WideTile(2, 64, 2, 160, 120), pairs, 2, late=True)


def test_which_shapes_it_takes() -> None:
    assert hopper_shared_tile(128, 64) == Tile(64, 64, 4, 2)
    assert hopper_shared_tile(64, 128) == Tile(128, 64, 8, 4)
    for dim, rows in ((64, 16), (64, 32), (80, 64), (256, 64), (64, 256)):
        assert hopper_shared_tile(dim, rows) is None
        assert hopper_wide_shared_tile(dim, rows) is None
    assert hopper_wide_shared_tile(128, 128) == hopper_wide_shared_tile(128, 64)
    assert hopper_wide_shared_tile(128, 32) is None
    assert hopper_wide_shared_tile(64, 64) is None  # exponentials bound these
