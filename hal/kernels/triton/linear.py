"""Linears for few rows: y[rows, outputs] = x[rows, inputs] @ w[outputs, inputs]^T, bound by reading w.

Two forms. `few_rows_kernel` multiplies and adds: each thread holds eight inputs of a weight row at a
time, and a program few weight rows, so that even small matrices give thousands of programs and the
whole chip has loads in flight. `rows_kernel` uses the matrix units, w on the left, for up to 16
rows; where outputs alone don't fill the chip, programs share the inputs of an output tile, and the
last of them to finish adds the parts up, always in the same order: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["few_rows_kernel", "rows_kernel"]

_LANE = tl.constexpr(8)  # inputs of one weight row that a thread holds: 16 bytes in 16 bits


@triton.jit
def _input(
    x: tl.tensor, norm: tl.tensor, column: tl.tensor, num_inputs: tl.tensor,
    EVEN: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Inputs of one row in fp32, and their squares if NORM (the inputs are scaled by `norm` then)."""
    inside = column < num_inputs
    if EVEN:
        value = tl.load(x + column).to(tl.float32)
        if GATED:
            up = tl.load(x + num_inputs + column).to(tl.float32)
            value = value / (1.0 + tl.exp(-value)) * up
    else:
        value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(x + num_inputs + column, mask=inside, other=0.0).to(tl.float32)
            value = value / (1.0 + tl.exp(-value)) * up
    square = value * value
    if NORM:
        if EVEN:
            value *= tl.load(norm + column).to(tl.float32)
        else:
            value *= tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    return value, square


@triton.jit
def _lane_sums(
    weight: tl.tensor, value: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """weight [N, K] times value [K], summed within each thread's eight: [N, K / 8]."""
    product = weight * value[None, :]
    return tl.sum(tl.reshape(product, [BLOCK_N, BLOCK_K // _LANE, _LANE]), 2)


@triton.jit
def _finish(
    sums: tl.tensor, squares: tl.tensor, y: tl.tensor, bias: tl.tensor, residual: tl.tensor,
    output: tl.tensor, num_inputs: tl.tensor, eps: tl.tensor, num_outputs: tl.tensor,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    """Add what threads hold of one row of x, and store its outputs."""
    total = tl.sum(sums, 1)
    if NORM:
        total *= 1.0 / tl.sqrt(tl.sum(squares, 0) / num_inputs + eps)
    inside = output < num_outputs
    if BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + output, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["residual_row"])
def few_rows_kernel(
    x: tl.tensor, w: tl.tensor, y: tl.tensor, bias: tl.tensor, residual: tl.tensor,
    norm: tl.tensor, num_outputs: tl.tensor, num_inputs: tl.tensor, x_row: tl.tensor,
    w_row: tl.tensor, residual_row: tl.tensor, eps: tl.tensor,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr,
) -> None:  # fmt: skip
    """x [ROWS, inputs], or [ROWS, 2 x inputs] if GATED: silu of the first half times the second.

    bias [outputs]; residual [ROWS, outputs] is added; norm [inputs]: the weight of an RMS norm that x
    goes through. y [ROWS, outputs]. ROWS: 1 to 4. EVEN: inputs are whole blocks. STAGES: blocks of w
    in flight through shared memory; 1: through registers. Grid: output tiles.
    """
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end: the last row again. A mask on w would cost more than reading it twice.
    source = w + tl.minimum(output, num_outputs - 1).to(tl.int64)[:, None] * w_row
    inside = tl.arange(0, BLOCK_K)
    sums0 = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    sums1 = sums0
    sums2 = sums0
    sums3 = sums0
    squares0 = tl.zeros([BLOCK_K], tl.float32)
    squares1 = squares0
    squares2 = squares0
    squares3 = squares0
    for start in tl.range(0, num_inputs, BLOCK_K, num_stages=STAGES):
        column = start + inside
        if EVEN:
            weight = tl.load(source + column[None, :], eviction_policy="evict_first")
        else:
            weight = tl.load(source + column[None, :], mask=(column < num_inputs)[None, :],
                             other=0.0, eviction_policy="evict_first")  # fmt: skip
        weight = weight.to(tl.float32)
        value, square = _input(x, norm, column, num_inputs, EVEN, NORM, GATED)
        sums0 += _lane_sums(weight, value, BLOCK_N, BLOCK_K)
        squares0 += square
        if ROWS > 1:
            value, square = _input(x + x_row, norm, column, num_inputs, EVEN, NORM, GATED)
            sums1 += _lane_sums(weight, value, BLOCK_N, BLOCK_K)
            squares1 += square
        if ROWS > 2:
            value, square = _input(x + 2 * x_row, norm, column, num_inputs, EVEN, NORM, GATED)
            sums2 += _lane_sums(weight, value, BLOCK_N, BLOCK_K)
            squares2 += square
        if ROWS > 3:
            value, square = _input(x + 3 * x_row, norm, column, num_inputs, EVEN, NORM, GATED)
            sums3 += _lane_sums(weight, value, BLOCK_N, BLOCK_K)
            squares3 += square
    _finish(sums0, squares0, y, bias, residual, output, num_inputs, eps, num_outputs,
            NORM, BIAS, RESIDUAL)  # fmt: skip
    if ROWS > 1:
        _finish(sums1, squares1, y + num_outputs, bias, residual + residual_row, output, num_inputs,
                eps, num_outputs, NORM, BIAS, RESIDUAL)  # fmt: skip
    if ROWS > 2:
        _finish(sums2, squares2, y + 2 * num_outputs, bias, residual + 2 * residual_row, output,
                num_inputs, eps, num_outputs, NORM, BIAS, RESIDUAL)  # fmt: skip
    if ROWS > 3:
        _finish(sums3, squares3, y + 3 * num_outputs, bias, residual + 3 * residual_row, output,
                num_inputs, eps, num_outputs, NORM, BIAS, RESIDUAL)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "residual_row"])
def rows_kernel(
    x: tl.tensor, w: tl.tensor, y: tl.tensor, bias: tl.tensor, residual: tl.tensor,
    partial: tl.tensor, tickets: tl.tensor, num_rows: tl.tensor, num_outputs: tl.tensor,
    num_inputs: tl.tensor, x_row: tl.tensor, w_row: tl.tensor, residual_row: tl.tensor,
    split_inputs: tl.tensor,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    """x [num_rows, inputs], num_rows <= ROWS (16); bias [outputs]; residual and y [num_rows, outputs].

    split_inputs: inputs of a split, whole blocks. With SPLITS > 1: partial holds fp32 [tiles, SPLITS,
    BLOCK_N, ROWS], tickets int32 [tiles] zeros, which are zeros again afterwards. EVEN: inputs are
    whole blocks. Grid: (output tiles, SPLITS).
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    inside = tl.arange(0, BLOCK_K)
    source = w + tl.minimum(output, num_outputs - 1).to(tl.int64)[:, None] * w_row
    values = x + row[None, :] * x_row
    here = (row < num_rows)[None, :]
    first = split * split_inputs
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(first, tl.minimum(first + split_inputs, num_inputs), BLOCK_K):
        column = start + inside
        if EVEN:
            weight = tl.load(source + column[None, :], eviction_policy="evict_first")
            value = tl.load(values + column[:, None], mask=here, other=0.0)
        else:
            there = column < num_inputs
            weight = tl.load(source + column[None, :], mask=there[None, :], other=0.0)
            value = tl.load(values + column[:, None], mask=here & there[:, None], other=0.0)
        sums = tl.dot(weight, value, sums, input_precision="ieee")
    finishes = True
    if SPLITS > 1:
        inner = tl.arange(0, BLOCK_N)[:, None] * ROWS + row[None, :]
        parts = partial + tile.to(tl.int64) * (SPLITS * BLOCK_N * ROWS) + inner
        tl.store(parts + split * (BLOCK_N * ROWS), sums)
        tl.debug_barrier()  # all of the part is written before its ticket is drawn
        finishes = tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if finishes:
        if SPLITS > 1:
            sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for part in tl.static_range(SPLITS):
                sums += tl.load(parts + part * (BLOCK_N * ROWS), cache_modifier=".cg")
            tl.store(tickets + tile, 0)
        stored = (output < num_outputs)[:, None] & here
        if BIAS:
            sums += tl.load(bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)[
                :, None
            ]
        if RESIDUAL:
            more = residual + row[None, :] * residual_row + output[:, None]
            sums += tl.load(more, mask=stored, other=0.0).to(tl.float32)
        target = y + row[None, :] * num_outputs + output[:, None]
        tl.store(target, sums.to(y.dtype.element_ty), mask=stored)
