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


def gate(x: torch.Tensor, weights: list[torch.Tensor], gelu: bool) -> torch.Tensor:
    first, second = (functional.linear(x, weight) for weight in weights)
    active = functional.gelu(first, approximate="tanh") if gelu else functional.silu(first)
    return active * second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (192, 34), (576, 1000)])
def test_gated_matches_fp64(dtype: torch.dtype, gelu: bool, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=generator).to(dtype) for _ in range(2)]
    packed = linear.pack_linear(*weights)
    for rows in (1, 2, 5, 6, 7, 33, 200):
        x = (torch.randn(rows, inputs, generator=generator) * inputs**-0.5).to(dtype)
        truth = gate(x.double(), [weight.double() for weight in weights], gelu)
        plain = gate(x, weights, gelu)
        found = linear.gated_linear(x, packed, outputs, gelu)
        assert found.dtype == dtype
        honest = (plain.double() - truth).abs().max().item()
        error = (found.double() - truth).abs().max().item()
        assert error <= 2 * honest + 1e-6, (rows, error, honest)


@pytest.mark.parametrize("gelu", [False, True])
def test_gates_far_out_are_open_or_shut(gelu: bool) -> None:
    weights = [torch.eye(64), torch.ones(64, 64)]
    packed = linear.pack_linear(*weights)
    x = torch.zeros(2, 64)
    x[0, :8] = torch.tensor([-3e38, -1e5, -200.0, -90.0, 90.0, 200.0, 1e5, 3e30])
    x[1, 3] = torch.nan
    found = linear.gated_linear(x, packed, 64, gelu)
    torch.testing.assert_close(found[0], gate(x[:1], weights, gelu)[0], atol=1e-30, rtol=1e-5)
    assert found[1].isnan().all()  # the sum over all inputs isn't a number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_row_depends_neither_on_the_others_nor_on_threads(dtype: torch.dtype) -> None:
    packed = linear.pack_linear(*(torch.randn(2048, 300).to(dtype) for _ in range(2)))
    x = torch.randn(200, 300).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(linear.gated_linear(x, packed, 2048, False))
            alone = [linear.gated_linear(x[n : n + 1], packed, 2048, False) for n in (0, 77, 199)]
            assert torch.equal(torch.cat(alone), found[-1][[0, 77, 199]])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gated_says_when_the_panels_are_not_two_halves() -> None:
    packed = linear.pack_linear(torch.randn(192, 32))
    with pytest.raises(ValueError, match="panels"):
        linear.gated_linear(torch.randn(2, 32), packed, 192, False)
    torch.library.opcheck(
        linear.gated_linear,
        (torch.randn(4, 32), linear.pack_linear(torch.randn(128, 32)), 64, True),
        test_utils=("test_schema", "test_faketensor"),
    )
