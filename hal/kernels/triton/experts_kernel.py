"""A mixture of experts on a GPU: (token, choice) pairs in the order of their experts, and their products.

Nothing of it needs the host: `sort_pairs_kernel` lays pairs out in tiles of one expert each, and the
programs of `experts_kernel` find on the device what their tile is, so a step with it can be recorded.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["experts_kernel", "sort_pairs_kernel"]


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def sort_pairs_kernel(
    ids: tl.tensor, order: tl.tensor, tile_expert: tl.tensor,
    num_pairs: tl.tensor, num_tiles: tl.tensor,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """ids int64 [num_pairs] -> order int32 [num_tiles, BLOCK_M], tile_expert int32 [num_tiles].

    A tile holds pairs of one expert, in their order; num_pairs where it has none, and -1 for the expert
    of a tile without any. BINS: a power of two above EXPERTS. Grid: experts, of which each counts all
    pairs, so that none waits for another.
    """
    own = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair = start + place
        expert = tl.load(ids + pair, mask=pair < num_pairs, other=EXPERTS).to(tl.int32)
        counts += tl.histogram(expert, BINS)
    tiles = tl.where(bins < EXPERTS, (counts + (BLOCK_M - 1)) // BLOCK_M, 0)
    first = tl.sum(tl.where(bins < own, tiles, 0), 0)
    many = tl.sum(tl.where(bins == own, tiles, 0), 0)
    mine = order + first * BLOCK_M
    seen = 0
    for start in range(0, num_pairs, BLOCK):
        pair = start + place
        expert = tl.load(ids + pair, mask=pair < num_pairs, other=EXPERTS).to(tl.int32)
        hit = (expert == own).to(tl.int32)
        tl.store(mine + seen + tl.cumsum(hit, 0) - 1, pair, mask=hit != 0)
        seen += tl.sum(hit, 0)
    rest = seen + tl.arange(0, BLOCK_M)
    tl.store(mine + rest, tl.zeros([BLOCK_M], tl.int32) + num_pairs, mask=rest < many * BLOCK_M)
    for start in range(0, many, BLOCK):
        tile = start + place
        tl.store(tile_expert + first + tile, tl.zeros([BLOCK], tl.int32) + own, mask=tile < many)
    if own == EXPERTS - 1:
        for start in range(first + many, num_tiles, BLOCK):
            tile = start + place
            tl.store(tile_expert + tile, tl.full([BLOCK], -1, tl.int32), mask=tile < num_tiles)


@triton.jit
def _activated(
    gate: tl.tensor, up: tl.tensor, alpha: tl.tensor, limit: tl.tensor,
    ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As hal/kernels/experts.py `gated`, in fp32."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if ACTIVATION == "silu":
        result = gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":  # x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
        slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
        result = gate / (1.0 + tl.exp(-slope)) * up
    elif ACTIVATION == "relu":
        result = tl.maximum(gate, 0.0) * up
    else:
        tl.static_assert(ACTIVATION == "swigluoai")
        result = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    return result


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "alpha", "limit"])
def experts_kernel(
    x: tl.tensor, w: tl.tensor, bias: tl.tensor, weights: tl.tensor, y: tl.tensor,
    order: tl.tensor, tile_expert: tl.tensor, num_pairs: tl.tensor, num_tiles: tl.tensor,
    num_inputs: tl.tensor, num_outputs: tl.tensor, x_row: tl.tensor,
    w_expert: tl.tensor, w_output: tl.tensor, w_input: tl.tensor, alpha: tl.tensor, limit: tl.tensor,
    CHOICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr, TRANSPOSED: tl.constexpr,
) -> None:  # fmt: skip
    """y[pair] = x[pair / CHOICES] @ w[its expert]^T (+ bias[expert]) (* weights[pair]).

    x [.., num_inputs]; w [experts, rows, num_inputs] by its strides; y [num_pairs, num_outputs]. With an
    ACTIVATION w and bias have 2 x num_outputs rows, of gate and up: one behind the other, or in turns if
    INTERLEAVED; a tile then has BLOCK_N / 2 outputs. EVEN: inputs are whole blocks; WHOLE: outputs are.
    TRANSPOSED: outputs of w lie side by side, not inputs. Tiles: see sort_pairs_kernel. Grid: tiles x
    blocks of outputs; GROUP_M tiles share what they read of w.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N  # outputs of a tile
    blocks = tl.cdiv(num_outputs, WIDTH)
    group = tl.program_id(0) // (GROUP_M * blocks)
    inside = tl.program_id(0) % (GROUP_M * blocks)
    high = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + inside % high
    block = inside // high
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    pair = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    there = pair < num_pairs
    row = tl.where(there, pair, 0) // CHOICES
    part = tl.arange(0, BLOCK_N)
    rows = 2 * num_outputs if GATED else num_outputs
    if GATED and not INTERLEAVED:
        column = block * WIDTH + part // 2
        if not WHOLE:  # past the end the last one again: a mask on w would cost more
            column = tl.minimum(column, num_outputs - 1)
        column += part % 2 * num_outputs
    else:
        column = block * BLOCK_N + part
        if not WHOLE and not TRANSPOSED:
            column = tl.minimum(column, rows - 1)
    exists = column < rows
    inner = tl.arange(0, BLOCK_K)
    values = x + row.to(tl.int64)[:, None] * x_row + inner[None, :]
    matrix = (
        w + expert.to(tl.int64) * w_expert
        + column.to(tl.int64)[None, :] * w_output + inner.to(tl.int64)[:, None] * w_input
    )  # fmt: skip
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        within = inner < num_inputs - start
        if EVEN:  # noqa: SIM108 - Triton's
            value = tl.load(values)
        else:
            value = tl.load(values, mask=within[None, :], other=0.0)
        if TRANSPOSED and not WHOLE:
            weight = tl.load(matrix, mask=exists[None, :] & within[:, None], other=0.0)
        elif EVEN:
            weight = tl.load(matrix)
        else:
            weight = tl.load(matrix, mask=within[:, None], other=0.0)
        sums = tl.dot(value, weight, sums, input_precision="ieee")
        values += BLOCK_K
        matrix += BLOCK_K * w_input
    if BIAS:
        sums += tl.load(bias + expert * rows + column, mask=exists, other=0.0).to(tl.float32)[
            None, :
        ]
    if GATED:
        gate, up = tl.split(tl.reshape(sums, [BLOCK_M, WIDTH, 2]))
        result = _activated(gate, up, alpha, limit, ACTIVATION, CLAMPED)
    else:
        result = sums
    if WEIGHTED:
        result *= tl.load(weights + pair, mask=there, other=0.0).to(tl.float32)[:, None]
    output = block * WIDTH + tl.arange(0, WIDTH)
    target = y + pair.to(tl.int64)[:, None] * num_outputs + output[None, :]
    stored = there[:, None] & (output < num_outputs)[None, :]
    tl.store(target, result.to(y.dtype.element_ty), mask=stored)
