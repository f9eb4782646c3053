"""Triton kernels compile ahead of time for GPUs that aren't here (a part of ci/triton_targets.py)."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

from halyard.hal.errors import BackendUnavailableError
from halyard.hal.kernels.triton.targets import KERNELS, TARGETS, Variant, compile_variant, variants
from halyard.hal.kernels.triton.tiles import SHARED_LIMITS, decode_tile, family, prefill_tile

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets"
)


@compiles
@pytest.mark.parametrize("target", list(TARGETS))
def test_decode_and_prefill_fit_each_target(target: str) -> None:
    for kernel in ("decode_features", "prefill"):
        report = compile_variant(Variant(kernel, target, "bfloat16", 128))  # type: ignore[arg-type]
        assert not report.problems()
        assert 0 < report.shared <= report.shared_limit
        assert report.matrix


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_compiles_for_both_vendors(kernel: str) -> None:
    for target in ("sm_90",) if kernel.endswith("_hopper") else ("sm_90", "gfx942"):
        dim = 128 if kernel.startswith("wide") else 64
        report = compile_variant(Variant(kernel, target, "float16", dim))  # type: ignore[arg-type]
        assert not report.problems()


@compiles
def test_tiles_of_keys_are_pipelined() -> None:
    """Two stages of keys and values in flight: half the shared memory means they are not."""
    report = compile_variant(Variant("decode", "sm_90", "bfloat16", 128))
    assert report.shared >= 2 * 2 * 64 * 128 * 2


@compiles
def test_products_on_hopper_run_beside_the_softmax() -> None:
    """ptxas says nothing where it can't follow, and has each product waited for at once."""
    for dim, block_size in itertools.product((64, 128), (16, 32, 64, 128)):
        variant = Variant("prefill_hopper", "sm_90", "bfloat16", dim)
        report = compile_variant(variant, block_size=block_size)
        assert not report.problems()
        if dim == 128:
            for kernel in ("wide_hopper", "wide_shared_hopper"):
                wide = compile_variant(replace(variant, kernel=kernel), block_size=block_size)  # type: ignore[arg-type]
                assert not wide.problems()
                assert 0 < wide.waits < sum(wide.matrix.values()) / 2
    assert 0 < report.waits < sum(report.matrix.values()) / 2
    assert replace(report, waits=sum(report.matrix.values())).problems()


def test_what_hopper_alone_has_is_listed_for_hopper_alone() -> None:
    found = {str(variant) for variant in variants(kernels=("prefill_hopper",))}
    dims = [f"sm_90 prefill_hopper {dtype} d{dim}" for dtype in ("bfloat16", "float16")
            for dim in (64, 128)]  # fmt: skip
    assert found == set(dims)


@compiles
def test_a_tile_over_the_limit_is_seen() -> None:
    report = compile_variant(
        Variant("decode", "gfx942", "bfloat16", 128), block_n=256, num_stages=4
    )
    assert any("shared memory" in problem for problem in report.problems())
    fine = compile_variant(Variant("decode", "gfx942", "bfloat16", 128))
    assert replace(fine, spills=3).problems()
    assert replace(fine, matrix={}).problems()


@pytest.mark.parametrize("arch", [*SHARED_LIMITS, "gfx1151", "sm_89", "sm_103", "x86_64"])
@pytest.mark.parametrize("item_size", [2, 4])
def test_every_architecture_has_tiles(arch: str, item_size: int) -> None:
    for dim in (16, 64, 128, 256):
        decode = decode_tile(arch, dim, item_size, group=4)
        assert decode.block_n >= 16
        assert prefill_tile(arch, dim, item_size).block_m >= 16
        if family(arch) != "interpreter":
            in_flight = (decode.num_stages - 1) * 2 * decode.block_n * dim * item_size
            assert in_flight <= SHARED_LIMITS[family(arch)]


@pytest.mark.parametrize("arch", ["sm_75", "gfx906", "gfx1030"])
def test_others_are_refused_in_one_line(arch: str) -> None:
    with pytest.raises(BackendUnavailableError, match=arch):
        family(arch)
