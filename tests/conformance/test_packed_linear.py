"""The packed linear against fp64, at every ISA level that this machine runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from halyard.hal.kernels.native import linear

pytestmark = pytest.mark.usefixtures("each_isa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (100, 34), (1, 2), (600, 1000)])
def test_matches_fp64(dtype: torch.dtype, bias: bool, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    extra = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    packed = linear.pack_linear(weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 16, 33, 200):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        truth = functional.linear(
            x.double(), weight.double(), None if extra is None else extra.double()
        )
        plain = functional.linear(x, weight, extra)
        found = linear.packed_linear(x, packed, extra, outputs)
        assert found.dtype == dtype
        honest = (plain.double() - truth).abs().max().item()
        error = (found.double() - truth).abs().max().item()
        slack = 1e-5 if dtype == torch.float32 else 0.02 * truth.abs().max().item()
        assert error <= 4 * honest + slack, (rows, error, honest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    weight = torch.randn(130, 900).to(dtype)
    x = torch.randn(200, 900).to(dtype)
    packed = linear.pack_linear(weight)
    together = linear.packed_linear(x, packed, None, 130)
    for row in (0, 5, 77, 199):
        alone = linear.packed_linear(x[row : row + 1], packed, None, 130)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(3000, 800).to(dtype)
    packed = linear.pack_linear(weight)
    before = torch.get_num_threads()
    try:
        for rows in (1, 9):
            x = torch.randn(rows, 800).to(dtype)
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(linear.packed_linear(x, packed, None, 3000))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_is_undone(dtype: torch.dtype) -> None:
    weight = torch.randn(100, 34).to(dtype)
    assert torch.equal(linear.unpack_linear(linear.pack_linear(weight), 100), weight)


def test_strided_input_leading_dims_no_rows_and_export() -> None:
    weight = torch.randn(70, 32)
    packed = linear.pack_linear(weight)
    x = torch.randn(3, 64, 5).transpose(1, 2)[..., ::2]
    found = linear.packed_linear(x, packed, None, 70)
    assert torch.allclose(found, functional.linear(x, weight), atol=1e-4)
    assert linear.packed_linear(torch.randn(0, 32), packed, None, 70).shape == (0, 70)
    torch.library.opcheck(
        linear.packed_linear,
        (torch.randn(4, 32), packed, None, 70),
        test_utils=("test_schema", "test_faketensor"),
    )
