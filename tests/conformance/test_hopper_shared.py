"""Hopper's kernel for shared keys, its Python run on torch tensors: places, masks, splits without keys."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

from gluon_in_python import in_python

from halyard.hal.kernels.triton import hopper_online, hopper_shared
from halyard.hal.kernels.triton.launch import AttentionLauncher, Shape
from halyard.hal.kernels.triton.tiles import Tile, hopper_shared_tile
from halyard.hal.types import AttentionLayer, SharedRows, StepBatch

LOG2E = 1.4426950408889634
FIRST = 1  # splits of rows' own keys, which lie in front


pytestmark = pytest.mark.usefixtures("one_thread")


def check(
    shape: Shape, tile: Tile, tiles: list[tuple[list[int], int]], splits: int, late: bool
) -> None:
    """Parts and their log-sum-exp, merged, against fp64; what isn't of a shared split stays.

    tiles: (rows, keys that they share); a tile without keys isn't used.
    """
    torch.manual_seed(0)
    heads, kv_heads, dim, block = (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
    )
    rows = 1 + max(row for members, _ in tiles for row in members)
    needs = [-(-keys // block) for _, keys in tiles]
    order = torch.randperm(sum(needs) + 3).tolist()
    pool = torch.full((len(order), 2, kv_heads, block, dim), float("nan"))
    tables = torch.full((rows, max(needs) + 2), -1, dtype=torch.int32)
    starts = torch.arange(3, 3 + rows + 1, dtype=torch.int32)  # tokens of others are in front
    q = torch.randn(int(starts[-1]), heads, dim)
    tile_rows = torch.full((len(tiles), SharedRows.WIDTH), -1, dtype=torch.int32)
    truth = torch.full((rows, heads, dim), float("nan"), dtype=torch.float64)
    lse_truth = torch.full((rows, heads), float("nan"), dtype=torch.float64)
    for number, ((members, keys), need) in enumerate(zip(tiles, needs, strict=True)):
        if not keys:
            continue
        own = [order.pop() for _ in range(need)]
        k, v = torch.randn(2, keys, kv_heads, dim).unbind()
        for position in range(keys):
            pool[own[position // block], 0, :, position % block] = k[position]
            pool[own[position // block], 1, :, position % block] = v[position]
        tile_rows[number, : len(members)] = torch.tensor(members, dtype=torch.int32)
        for row in members:
            tables[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        wide = [x.double().repeat_interleave(shape.group, 1) for x in (k, v)]
        query = q[starts[members].long()].double()
        scores = torch.einsum("rhd,khd->rhk", query, wide[0]) * dim**-0.5
        lse_truth[members] = scores.logsumexp(-1)
        truth[members] = torch.einsum("rhk,khd->rhd", scores.softmax(-1), wide[1])
    partial = torch.full((rows, heads, FIRST + splits, dim), float("nan"))
    lse = torch.full((rows, heads, FIRST + splits), float("nan"))
    with in_python(late, hopper_shared, hopper_online) as run:
        run(
            "hopper_shared_kernel", (len(tiles), kv_heads, splits), q, pool, partial, lse, tables,
            starts, tile_rows, torch.tensor([keys for _, keys in tiles], dtype=torch.int32),
            dim**-0.5 * LOG2E, heads * dim, dim, tables.shape[1], FIRST + splits, FIRST,
            **shape.hopper_shared_constants(tile), num_warps=tile.num_warps,
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


TILES: dict[str, list[tuple[list[int], int]]] = {
    "one": [(list(range(16)), 512)],
    "few rows, few keys": [([2, 0], 16)],
    "two prefixes": [([5, 1, 3], 208), (list(range(6, 20)), 80)],
    "unused between": [([0, 1], 96), ([], 0), ([4, 2, 3], 336), ([], 0)],
}


@pytest.mark.parametrize("late", [False, True], ids=["at_once", "late"])
@pytest.mark.parametrize("tiles", list(TILES))
@pytest.mark.parametrize("dim", [64, 128])
def test_tiles(dim: int, tiles: str, late: bool) -> None:
    shape = shaped(dim=dim)
    tile = hopper_shared_tile(dim, SharedRows.WIDTH * shape.group)
    assert tile is not None
    for splits in (1, 2, 5):  # of five some have no keys
        check(shape, tile, TILES[tiles], splits, late)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_blocks_and_stages(block: int, stages: int) -> None:
    tiles = [([0, 2], 5 * 128), ([1, 3, 4], 128)]
    for width in (32, 64):
        check(shaped(block=block), Tile(64, width, 4, stages), tiles, 3, late=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (8, 1), (10, 2), (14, 2)])
def test_groups(heads: int, kv_heads: int) -> None:
    shape = shaped(heads, kv_heads)
    tile = hopper_shared_tile(64, int(shape.hopper_shared_constants(Tile(0, 64, 4, 2))["GROUP_PAD"]) * 16)  # fmt: skip
    assert tile is not None
    check(shape, tile, [([3, 1], 160), ([0, 2], 48)], 2, late=True)


def test_which_shapes_it_takes() -> None:
    assert hopper_shared_tile(128, 64) == Tile(64, 64, 4, 2)
    assert hopper_shared_tile(64, 128) == Tile(128, 64, 8, 4)
    for dim, rows in ((64, 16), (64, 32), (80, 64), (256, 64), (64, 256)):
        assert hopper_shared_tile(dim, rows) is None


def launched(arch: str, layer: AttentionLayer, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What a decode step of 20 rows that share their first keys launches, by name: its options."""
    info = SimpleNamespace(arch=arch, num_cores=132)
    launcher: Any = AttentionLauncher(SimpleNamespace(info=info))  # type: ignore[arg-type]
    found: dict[str, dict[str, Any]] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **options: found.update({self.name: options})

    for module, names in (
        ("_decode", ["paged_decode_kernel", "merge_kernel"]),
        ("_shared", ["shared_decode_kernel"]),
        ("_hopper_shared", ["hopper_shared_kernel"]),
    ):
        was = getattr(launcher, module)
        if was is not None:
            kept = {name: getattr(was, name, None) for name in ("choose_splits",)}
            setattr(
                launcher, module, SimpleNamespace(**kept, **{name: Kernel(name) for name in names})
            )
    rows, blocks = 20, 140
    whole = torch.zeros(2, SharedRows.WIDTH, dtype=torch.int32)
    keys = torch.full((2,), 2048, dtype=torch.int32)
    batch = StepBatch(
        rows, rows, 1, blocks * 16, torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, blocks, dtype=torch.int32),
        torch.full((rows,), 2100, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32),
        SharedRows(whole, keys, torch.full((rows,), 2048, dtype=torch.int32)),
    )  # fmt: skip
    q = torch.zeros(rows, layer.num_heads, layer.head_dim, dtype=dtype)
    data = torch.zeros(1, 2, layer.num_kv_heads, 16, layer.head_dim, dtype=dtype)
    launcher.attend(q, data, layer, batch)
    return found


def layer(heads: int = 32, kv_heads: int = 8, dim: int = 128, **more: Any) -> AttentionLayer:
    return AttentionLayer(0, heads, kv_heads, dim, dim**-0.5, **more)


def test_which_kernel_reads_what_is_shared() -> None:
    half = torch.bfloat16
    own = launched("sm_90", layer(), half)
    assert "hopper_shared_kernel" in own
    assert "shared_decode_kernel" not in own
    for others in (
        launched("sm_90", layer(), torch.float32),
        launched("sm_90", layer(softcap=30.0), half),
        launched("sm_90", layer(heads=8), half),  # 16 rows are no warpgroup
        launched("sm_90", layer(dim=80), half),
        launched("sm_80", layer(), half),
        launched("gfx942", layer(), half),
    ):
        assert "shared_decode_kernel" in others
        assert "hopper_shared_kernel" not in others
    for alone in (
        launched("sm_90", layer(window=512), half),
        launched("sm_90", layer(heads=16, kv_heads=1, dim=64), half),  # it would take longer
        launched("gfx1100", layer(dim=256), half),  # no room
    ):
        assert set(alone) & {"shared_decode_kernel", "hopper_shared_kernel"} == set()
        assert not alone["paged_decode_kernel"]["SHARED"]


@pytest.mark.parametrize(("arch", "early"), [("sm_80", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)])  # fmt: skip
def test_who_may_begin_early(arch: str, early: bool) -> None:
    """Only behind a kernel that lets it, and which it waits for."""
    together = launched(arch, layer(), torch.bfloat16)
    first = together.get("hopper_shared_kernel") or together["shared_decode_kernel"]
    assert first.get("EARLY", True) is early  # Hopper's own always lets it
    assert together["paged_decode_kernel"]["SHARED"]
    assert together["paged_decode_kernel"]["EARLY"] is early
    for name in ("paged_decode_kernel", "merge_kernel"):
        if name in together:
            assert together[name].get("launch_pdl", False) is early
    apart = launched(arch, layer(window=4096), torch.bfloat16)
    assert "launch_pdl" not in apart["paged_decode_kernel"]  # nothing in front of it lets it
