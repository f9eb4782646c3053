"""The linear over weights of 8 or 4 bits against fp64 of what its codes stand for, at every ISA level."""

from __future__ import annotations

import pytest
import torch

from halyard.hal.kernels.native.library import find_compiler
from halyard.hal.kernels.native.quantized_linear import (
    dequantize_linear,
    quantize_linear,
    quantized_embedding,
    quantized_linear,
)

pytestmark = [
    pytest.mark.usefixtures("each_isa"),
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here"),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 1), (320, 203), (1024, 640)])
def test_equals_dequantised(bits: int, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    packed = quantize_linear(weight, bits=bits)
    codes = dequantize_linear(packed, outputs, bits)
    loss = (codes - weight.float()).norm() / weight.float().norm()
    assert loss < (0.01 if bits == 8 else 0.14)
    x = torch.randn(203, inputs).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for addend in (None, bias):
        y = quantized_linear(x, packed, addend, outputs, bits)
        wanted = x.double() @ codes.double().T + (0 if addend is None else addend.double())
        torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
        for count in (1, 2, 3, 5, 6, 7, 193):  # a row's result depends on no other row
            alone = quantized_linear(x[:count], packed, addend, outputs, bits)
            assert torch.equal(alone, y[:count])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_looked_up(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = quantize_linear(torch.randn(203, 192).to(dtype), bits=bits)
    ids = torch.tensor([[0, 202, 63], [64, 17, 202]])
    rows = quantized_embedding(ids, packed, 192, bits, dtype == torch.bfloat16)
    assert torch.equal(rows, dequantize_linear(packed, 203, bits)[ids].to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("first", [64, 70])  # the second one begins a panel, or within one
def test_joined_as_quantised(bits: int, first: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(150, 128)
    weight[3] = 0
    joined = quantize_linear(weight[:first], weight[first:], bits=bits)
    assert torch.equal(joined, quantize_linear(weight, bits=bits))
    assert torch.equal(dequantize_linear(joined, 150, bits)[3], torch.zeros(128))
