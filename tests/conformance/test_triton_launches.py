"""What a step launches on which GPU, in which order, and what may begin early. Nothing runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

from prefill_problem import shaped

from halyard.hal.kernels.triton.launch import AttentionLauncher
from halyard.hal.kernels.triton.tiles import wide_tile
from halyard.hal.types import AttentionLayer, SharedRows, StepBatch

_KERNELS = {
    "_decode": ("paged_decode_kernel", "merge_kernel"),
    "_shared": ("shared_decode_kernel",),
    "_prefill": ("paged_prefill_kernel",),
    "_hopper": ("hopper_prefill_kernel",),
    "_hopper_wide": ("hopper_wide_kernel",),
    "_hopper_shared": ("hopper_shared_kernel",),
    "_hopper_wide_shared": ("hopper_wide_shared_kernel",),
}


class Recorder:
    """A kernel that notes its launches' options."""

    def __init__(self, name: str, found: dict[str, dict[str, Any]]) -> None:
        self.name, self.found = name, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **options: self.found.update({self.name: options})


def launched(
    arch: str, layer: AttentionLayer, dtype: torch.dtype, queries: Sequence[int] = (1,) * 20
) -> dict[str, dict[str, Any]]:
    """What a step of rows with 2100 keys launches, in order: options by name. Decode steps share 2048."""
    info = SimpleNamespace(arch=arch, num_cores=132)
    launcher: Any = AttentionLauncher(SimpleNamespace(info=info))  # type: ignore[arg-type]
    found: dict[str, dict[str, Any]] = {}
    for module, names in _KERNELS.items():
        was = getattr(launcher, module)
        if was is not None:
            kept = {"choose_splits": getattr(was, "choose_splits", None)}
            made = {name: Recorder(name, found) for name in names}
            setattr(launcher, module, SimpleNamespace(**kept, **made))
    rows, blocks, tokens = len(queries), 140, sum(queries)
    tiles = 2 * -(-rows // (2 * SharedRows.WIDTH))
    shared = SharedRows(
        torch.zeros(tiles, SharedRows.WIDTH, dtype=torch.int32),
        torch.full((tiles,), 2048, dtype=torch.int32), torch.full((rows,), 2048, dtype=torch.int32),
    )  # fmt: skip
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    batch = StepBatch(
        tokens, rows, max(queries), blocks * 16, torch.zeros(tokens, dtype=torch.int64),
        torch.zeros(tokens, dtype=torch.int64), torch.zeros(rows, blocks, dtype=torch.int32),
        torch.full((rows,), 2100, dtype=torch.int32), starts, shared if max(queries) == 1 else None,
    )  # fmt: skip
    q = torch.zeros(tokens, layer.num_heads, layer.head_dim, dtype=dtype)
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
    many = launched("sm_90", layer(), half, (1,) * 128)
    assert "hopper_wide_shared_kernel" in many
    assert set(many) & {"shared_decode_kernel", "hopper_shared_kernel"} == set()
    for few in (layer(dim=64), layer(heads=48, dim=64)):
        assert "hopper_shared_kernel" in launched("sm_90", few, half, (1,) * 128)
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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_rows_of_one_query_begin_beside_prompts(arch: str) -> None:
    """Where kernels may begin early, and only behind a kernel that lets them."""
    early = arch in ("sm_90", "sm_120")
    for long in (40, 2000):
        found = launched(arch, layer(), torch.bfloat16, (long, *(1,) * 20))
        names = list(found)
        assert names[1] == "paged_decode_kernel"
        expected = "hopper_wide_kernel" if long > 100 else "hopper_prefill_kernel"
        assert names[0] == (expected if arch == "sm_90" else "paged_prefill_kernel")
        assert found[names[0]]["SKIP_SINGLE"]
        assert found[names[0]].get("EARLY", True) is early  # Hopper's own always let them
        assert found["paged_decode_kernel"]["BESIDE"] is early
        assert found["paged_decode_kernel"].get("launch_pdl", False) is early
    alone = launched(arch, layer(), torch.bfloat16, (2100,))
    assert set(alone) <= {"hopper_wide_kernel", "hopper_prefill_kernel", "paged_prefill_kernel"}
    assert not any(options["SKIP_SINGLE"] for options in alone.values())


def test_who_takes_the_wide_kernel() -> None:
    """Long prompts, and enough of them for all multiprocessors; heads of 128 alone."""
    launcher = AttentionLauncher(SimpleNamespace(info=SimpleNamespace(arch="sm_90", num_cores=132)))  # type: ignore[arg-type]
    shape, tile = shaped(32, 8, 128), wide_tile(128)
    assert tile is not None
    assert wide_tile(64) is None

    def takes(tokens: int, rows: int) -> bool:
        batch = SimpleNamespace(num_tokens=tokens, num_rows=rows)
        return launcher._takes_wide(shape, tile, batch)  # type: ignore[arg-type]

    assert takes(8448, 3)
    assert takes(8448, 132)
    assert not takes(8448, 133)  # 63 queries a row
    assert takes(17 * 48, 1)
    assert not takes(16 * 48, 1)  # 128 programs
