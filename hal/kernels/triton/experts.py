"""Launches a mixture of experts: what hal/kernels/experts.py describes, on a GPU.

Everything is decided from shapes alone, never from the routing, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from halyard.hal.kernels.triton import experts_kernel as kernels
from halyard.hal.kernels.triton.skinny import arch_of
from halyard.hal.kernels.triton.tiles import SHARED_LIMITS, family

__all__ = ["Pairs", "ProductTile", "choose_tile", "expert_parts", "plan_pairs", "product"]

_SORTED = ((128, 4), (1024, 4), (4096, 8))  # pairs that a program sorts at once, its warps
_SPARE_BYTES = 8 << 10  # of shared memory, for what else a program keeps there


@dataclass(frozen=True, slots=True)
class ProductTile:
    """block_m pairs of one expert by block_n columns of its matrix, block_k inputs at a time.

    group_m: tiles of pairs that take the same columns one after the other.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"

    def stage_bytes(self, item_size: int) -> int:
        """Shared memory of one stage."""
        return (self.block_m + self.block_n) * self.block_k * item_size


@dataclass(frozen=True, slots=True)
class Pairs:
    """What sort_pairs_kernel makes: (token, choice) pairs in tiles of one expert each."""

    order: Tensor  # int32 [num_tiles x block_m]
    tile_expert: Tensor  # int32 [num_tiles]
    count: int
    num_tiles: int  # as many as there may be


# By pairs of a tile. On an H200: benchmarks/results/h200_experts.txt.
_NVIDIA = {
    16: ProductTile(16, 128, 128, 4, 4),
    32: ProductTile(32, 128, 128, 4, 3),
    64: ProductTile(64, 128, 64, 4, 4),
    128: ProductTile(128, 256, 64, 8, 4),
}
_AMD = {  # compiled, never run
    16: ProductTile(16, 64, 128, 4, 2),
    32: ProductTile(32, 64, 128, 4, 2),
    64: ProductTile(64, 128, 64, 4, 2),
    128: ProductTile(128, 128, 64, 8, 2),
}


def choose_tile(pairs: int, experts: int, item_size: int, arch: str) -> ProductTile:
    """For both products. Few experts have more than twice as many pairs as all have on average."""
    average = pairs / min(experts, pairs)
    rows = next((size for size in (16, 32, 64) if 2 * average <= size), 128)
    if item_size == 4:  # exact, not quick: no matrix units
        return ProductTile(min(rows, 32), 64, 32, 4, 2)
    tile = (_NVIDIA if arch.startswith("sm_") else _AMD)[rows]
    room = SHARED_LIMITS[family(arch)] - _SPARE_BYTES
    stages = min(tile.num_stages, max(2, room // tile.stage_bytes(item_size)))
    return replace(tile, num_stages=stages)


def expert_parts(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float = 0.0,
    tile: ProductTile | None = None,
) -> Tensor:
    """halyard::expert_parts; tile: None for that of `choose_tile`."""
    (tokens, choices), experts = expert_ids.shape, gate_up.shape[0]
    parts = hidden.new_empty((tokens * choices, hidden.shape[1]))
    if not parts.numel():
        return parts.view(tokens, choices, -1)
    if tile is None:
        arch = arch_of(hidden.device)
        tile = choose_tile(tokens * choices, experts, hidden.element_size(), arch)
    pairs = plan_pairs(expert_ids, experts, tile.block_m)
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    inner = hidden.new_empty((pairs.count, gate_up.shape[1] // 2))
    product(tile, hidden, gate_up, gate_up_bias, None, inner, choices, pairs,
            activation, interleaved, alpha, limit)  # fmt: skip
    product(tile, inner, down, down_bias, weights.contiguous(), parts, 1, pairs)
    return parts.view(tokens, choices, -1)


def plan_pairs(expert_ids: Tensor, experts: int, block_m: int) -> Pairs:
    """The (token, choice) pairs of expert_ids [tokens, choices] in tiles of block_m, expert by expert."""
    count = expert_ids.numel()
    num_tiles = (count + min(experts, count) * (block_m - 1)) // block_m
    order = torch.empty(num_tiles * block_m, dtype=torch.int32, device=expert_ids.device)
    tile_expert = torch.empty(num_tiles, dtype=torch.int32, device=expert_ids.device)
    block, warps = next((size for size in _SORTED if count <= size[0]), _SORTED[-1])
    kernels.sort_pairs_kernel[(experts,)](
        expert_ids.contiguous(), order, tile_expert, count, num_tiles, EXPERTS=experts,
        BINS=triton.next_power_of_2(experts + 1), BLOCK=block, BLOCK_M=block_m, num_warps=warps,
    )  # fmt: skip
    return Pairs(order, tile_expert, count, num_tiles)


def product(
    tile: ProductTile, x: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor | None, y: Tensor,
    choices: int, pairs: Pairs,
    activation: str = "", interleaved: bool = False, alpha: float = 1.0, limit: float = 0.0,
) -> None:  # fmt: skip
    """y[pair] = gated(x[pair // choices] @ w[its expert]^T + bias) * weights[pair]: see experts_kernel."""
    inputs, outputs = w.shape[2], y.shape[1]
    blocks = -(-outputs // (tile.block_n // 2 if activation else tile.block_n))
    kernels.experts_kernel[(pairs.num_tiles * blocks,)](
        x, w, y if bias is None else bias, y if weights is None else weights, y,
        pairs.order, pairs.tile_expert, pairs.count, pairs.num_tiles, inputs, outputs,
        x.stride(0), *w.stride(), alpha, limit, CHOICES=choices,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        EVEN=inputs % tile.block_k == 0, ACTIVATION=activation, CLAMPED=limit > 0, INTERLEAVED=interleaved,
        BIAS=bias is not None, WEIGHTED=weights is not None,
        WHOLE=w.shape[1] % tile.block_n == 0, TRANSPOSED=w.stride(2) != 1,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
