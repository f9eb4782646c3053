"""The oracle: written to be trusted by reading it, in fp32 whatever the inputs are.

A block of one layer is stored as [2, block_size, kv_heads, head_dim]: keys, then values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halyard.hal.contract import CONTRACT_VERSION, Device
from halyard.hal.kernels.moves import move_blocks
from halyard.hal.types import (
    AttentionLayer,
    BlockMove,
    Capabilities,
    DeviceInfo,
    KVLayout,
    KVPool,
    KVSpec,
    Probe,
    StepBatch,
)

__all__ = ["ReferenceKernels"]


class ReferenceKernels:
    """Plain torch, one row and one block at a time."""

    contract_version = CONTRACT_VERSION
    name = "reference"
    capabilities = Capabilities(
        dtypes=("float32", "float16", "bfloat16"),
        kv_dtypes=("float32", "float16", "bfloat16"),
        block_sizes=tuple(range(1, 257)),
        head_dims=None,
        max_gqa_ratio=None,
    )

    def __init__(self, device: Device) -> None:
        self.device = device

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        if device.kind == "cpu":
            return Probe(True)
        return Probe(False, (f"the reference kernels run on the cpu, not on {device.kind}",))

    def layout(self, spec: KVSpec) -> KVLayout:
        return KVLayout(spec, (2, spec.block_size, spec.num_kv_heads, spec.head_dim), spec.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        blocks = pool.data[layer.index]
        size = pool.layout.spec.block_size
        for token, slot in enumerate(batch.slot_mapping.tolist()):
            if slot >= 0:
                blocks[slot // size, 0, slot % size] = k[token].to(blocks.dtype)
                blocks[slot // size, 1, slot % size] = v[token].to(blocks.dtype)
        out = torch.empty_like(q)
        starts = batch.query_start.tolist()
        for row, seq_len in enumerate(batch.seq_lens.tolist()):
            first, last = starts[row], starts[row + 1]
            used = batch.block_tables[row, : -(-seq_len // size)].tolist()
            keys, values = (
                torch.cat([blocks[block, which] for block in used])[:seq_len].float()
                for which in (0, 1)
            )
            out[first:last] = _attend_row(q[first:last].float(), keys, values, layer).to(q.dtype)
        return out

    def copy_blocks(self, pool: KVPool, moves: Sequence[BlockMove]) -> None:
        move_blocks(pool, pool, moves)

    def swap_out(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        move_blocks(pool, host, moves)

    def swap_in(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        move_blocks(host, pool, moves)

    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        chosen = pool.data[:, list(blocks)]  # [layers, blocks, 2, block_size, kv_heads, head_dim]
        return chosen.permute(2, 0, 1, 3, 4, 5).contiguous()

    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        pool.data[:, list(blocks)] = data.permute(1, 2, 0, 3, 4, 5)


def _attend_row(q: Tensor, keys: Tensor, values: Tensor, layer: AttentionLayer) -> Tensor:
    """One sequence: q [queries, heads, dim] are the last tokens of keys, values [length, kv, dim]."""
    queries, length = q.shape[0], keys.shape[0]
    group = layer.num_heads // layer.num_kv_heads
    keys = keys.repeat_interleave(group, dim=1)  # [length, heads, dim]
    values = values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    query_position = torch.arange(length - queries, length)[:, None]
    key_position = torch.arange(length)[None, :]
    visible = key_position <= query_position
    if layer.window:
        visible &= query_position - key_position < layer.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if layer.sinks is not None:  # a logit that takes part in the softmax and has no value
        sink = layer.sinks.float()[:, None, None].expand(-1, queries, 1)
        probabilities = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probabilities = scores.softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", probabilities, values)
