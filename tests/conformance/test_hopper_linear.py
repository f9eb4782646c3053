"""Hopper's gated product, its Python run on torch tensors: stages, barriers, tiles at the edges."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

from gluon_in_python import Boxes, in_python

from halyard.hal import fallbacks
from halyard.hal.kernels.triton import gated, hopper_linear

M, N, K = 8, 4, 4  # boxes: small ones have as many edges


pytestmark = pytest.mark.usefixtures("one_thread")


def multiply(
    rows: int, inputs: int, outputs: int, late: bool, *, programs: int = 3, stages: int = 4,
    group: int = 2, gelu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(what the kernel gives, what torch does in fp64)."""
    torch.manual_seed(rows + inputs)
    x, weight = torch.randn(rows, inputs), torch.randn(2 * outputs, inputs)
    first, second = (x.double() @ weight.double().T).chunk(2, -1)
    truth = (F.gelu(first, approximate="tanh") if gelu else F.silu(first)) * second
    out = torch.full((rows, outputs), float("nan"))
    with in_python(late, hopper_linear) as run:
        run(
            "gated_product_kernel", (programs, 1), Boxes(x, M, K), Boxes(weight, N, K),
            Boxes(out, M, N), rows, inputs, outputs, num_warps=8, BLOCK_M=M, BLOCK_N=N, BLOCK_K=K,
            STAGES=stages, GROUP_M=group, GELU=gelu,
        )  # fmt: skip
    return out, truth.float()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 4, 4), (8, 16, 8), (9, 40, 12), (40, 12, 20), (33, 6, 8), (7, 64, 4)],
)
def test_products_are_exact(rows: int, inputs: int, outputs: int, late: bool) -> None:
    """Fewer tiles than programs and more, fewer steps than stages and more, odd inputs and rows."""
    found, truth = multiply(rows, inputs, outputs, late)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("programs", "stages", "group"), [(1, 2, 1), (2, 3, 3), (5, 5, 16)])
def test_any_number_of_programs_and_stages(
    programs: int, stages: int, group: int, late: bool
) -> None:
    found, truth = multiply(
        50, 28, 16, late, programs=programs, stages=stages, group=group, gelu=True
    )
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)


MUTATIONS = {
    "a stage is let go while its product runs": ("warpgroup_mma_wait(1, deps=[acc])\n", "warpgroup_mma_wait(2, deps=[acc])\n"),
    "a stage is read before it is full": ("mbarrier.wait(full.index(slot), stage // STAGES & 1)", "pass"),
    "a stage is written before it is empty": ("mbarrier.wait(empty.index(slot), (stage // STAGES & 1) ^ 1)", "pass"),
    "another stage is let go": ("(stage + STAGES - 1) % STAGES), pred=k > 0", "stage % STAGES), pred=k > 0"),
    "the parity is that of the phase before": ("stage // STAGES & 1)\n", "(stage // STAGES & 1) ^ 1)\n"),
    "both halves are the gate's": ("[outputs + n * BLOCK_N, k]", "[n * BLOCK_N, k]"),
    "the result is overwritten while it is stored": ("tma.store_wait(0)  # of the tile before", "pass"),
    "the last result isn't waited for": ("    tma.store_wait(0)\n\n\n@gluon", "    pass\n\n\n@gluon"),
    "the last stage of a tile stays taken": ("        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_broken_kernels_are_noticed(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util
    from pathlib import Path

    import gluon_in_python

    old, new = MUTATIONS[name]
    source = Path(hopper_linear.__file__).read_text()
    assert source.count(old) == 1
    file = tmp_path / "broken_linear.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken_linear", file)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(sys.modules[__name__], "hopper_linear", broken)
    monkeypatch.setattr(gluon_in_python, "PATIENCE", 0.5)
    noticed = False
    for late in (False, True):
        for _ in range(3):  # threads: a race may be won
            try:
                found, truth = multiply(40, 28, 16, late)
            except AssertionError:
                noticed = True
            else:
                noticed |= not torch.allclose(found, truth, atol=1e-4, rtol=1e-4)
    assert noticed


def test_only_what_fits_goes_to_the_kernel() -> None:
    takes = gated.takes_hopper
    assert takes(8448, 4096, 14336, 2, 132)
    assert not takes(8448, 4096, 14336, 4, 132)  # fp32
    assert not takes(8448, 4096, 14336 + 64, 2, 132)  # no whole tiles
    assert not takes(8448, 4100, 14336, 2, 132)  # rows that don't begin at 16 bytes
    assert not takes(512, 2048, 8192, 2, 132)  # too few for every multiprocessor
    assert not takes(640, 4096, 14336, 2, 132)  # 4.2 turns: most of the fifth is idle


def test_without_its_parts_the_library_multiplies_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda device: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
    )  # fmt: skip
    monkeypatch.setattr(torch.version, "hip", None)
    gated._cores.cache_clear()
    assert gated._cores(torch.device("cuda", 0)) == 132
    gated._cores.cache_clear()
    before = fallbacks.counts().get("gated_product", 0)
    monkeypatch.setitem(sys.modules, "halyard.hal.kernels.triton.hopper_linear", None)
    assert gated._cores(torch.device("cuda", 0)) == 0
    assert fallbacks.counts()["gated_product"] == before + 1
    gated._cores.cache_clear()
