"""Rows of queries over a paged pool, with attention in fp64 beside: for kernels run in Python."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halyard.hal.kernels.triton.launch import Shape

ROWS: dict[str, list[tuple[int, int]]] = {  # (queries, context with them)
    "whole prompts": [(1, 1), (15, 15), (64, 64), (65, 65), (150, 150)],
    "chunks": [(7, 500), (64, 256), (33, 191), (16, 193)],
    "mixed": [(1, 300), (40, 90), (1, 17), (0, 30), (20, 20)],
}


@dataclass(frozen=True)
class Problem:
    """What a prefill kernel is given, and the truth; what belongs to no key is NaN in the pool."""

    q: Tensor  # [tokens and 5 of no row, heads, dim]
    pool: Tensor  # [blocks, 2, kv_heads, block, dim]
    tables: Tensor
    lengths: Tensor
    starts: Tensor
    scale: float
    truth: Tensor  # rows that are left out are NaN


def problem(shape: Shape, rows: list[tuple[int, int]], skip_single: bool = False) -> Problem:
    """Random, the same each time."""
    torch.manual_seed(0)
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    dim, block = shape.head_dim, shape.block_size
    needs = [-(-context // block) for _, context in rows]
    blocks = sum(needs) + 3
    pool = torch.full((blocks, 2, kv_heads, block, dim), float("nan"))
    order = torch.randperm(blocks).tolist()
    width = max(needs) + 2
    tables = torch.full((len(rows), width), -1, dtype=torch.int32)
    tokens = sum(queries for queries, _ in rows)
    q = torch.randn(tokens + 5, heads, dim)  # tokens without a row fill up a recorded step
    truth = torch.full_like(q, float("nan"))
    starts, scale = [0], dim**-0.5
    for row, (queries, context) in enumerate(rows):
        own = [order.pop() for _ in range(needs[row])]
        tables[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        keys, values = torch.randn(2, context, kv_heads, dim).unbind()
        for position in range(context):
            slot = own[position // block], slice(None), position % block
            pool[slot[0], 0, :, slot[2]] = keys[position]
            pool[slot[0], 1, :, slot[2]] = values[position]
        starts.append(starts[-1] + queries)
        if not queries or (skip_single and queries == 1):
            continue
        wide = [x.double().repeat_interleave(shape.group, 1) for x in (keys, values)]
        scores = torch.einsum("qhd,khd->hqk", q[starts[-2] : starts[-1]].double(), wide[0]) * scale
        seen = torch.arange(context)[None] <= torch.arange(context - queries, context)[:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        truth[starts[-2] : starts[-1]] = torch.einsum("hqk,khd->qhd", weights, wide[1]).float()
    lengths = torch.tensor([context for _, context in rows], dtype=torch.int32)
    begins = torch.tensor(starts, dtype=torch.int32)
    return Problem(q, pool, tables, lengths, begins, scale, truth)


def shaped(heads: int = 8, kv_heads: int = 2, dim: int = 64, block: int = 16) -> Shape:
    """Plain heads of 16 bits."""
    return Shape(heads, kv_heads, dim, block, 2, False, False, False)
