"""The gate of a feed-forward layer, where its product is the library's: act(first half) * second half."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gate_kernel"]


@triton.jit
def gate_kernel(
    y: tl.tensor, out: tl.tensor, num_outputs: tl.tensor,
    BLOCK: tl.constexpr, GELU: tl.constexpr,
) -> None:  # fmt: skip
    """y [rows, 2 x num_outputs] -> out [rows, num_outputs], both contiguous. Grid: rows, blocks."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_outputs
    first = y + row * 2 * num_outputs
    gate = tl.load(first + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(first + num_outputs + column, mask=inside, other=0.0).to(tl.float32)
    slope = gate
    if GELU:  # by tanh: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
        slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    result = gate / (1.0 + tl.exp(-slope)) * up
    tl.store(out + row * num_outputs + column, result.to(out.dtype.element_ty), mask=inside)
