"""Paged attention for the slate, in a layout of its own: one head's tokens side by side.

Written with plain tensor operations where a real backend calls its driver; everything else is as a
real one would have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from halyard.hal.contract import CONTRACT_VERSION, Device
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

__all__ = ["SlateKernels"]


class SlateKernels:
    """No softcap and no sinks: capabilities say so, and models that need them go elsewhere."""

    contract_version = CONTRACT_VERSION
    name = "slate"
    capabilities = Capabilities(
        dtypes=("float32",),
        kv_dtypes=("float32",),
        block_sizes=(16, 32),
        head_dims=None,
        max_gqa_ratio=None,
        softcap=False,
        sinks=False,
    )

    def __init__(self, device: Device) -> None:
        self.device = device

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        if device.kind == "slate":
            return Probe(True)
        return Probe(False, (f"the slate kernels run on the slate, not on {device.kind}",))

    def layout(self, spec: KVSpec) -> KVLayout:
        return KVLayout(spec, (spec.num_kv_heads, 2, spec.block_size, spec.head_dim), spec.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        blocks = pool.data[layer.index]  # [blocks, kv_heads, 2, size, dim]
        size = pool.layout.spec.block_size
        given = batch.slot_mapping >= 0
        slots = batch.slot_mapping[given]
        blocks[slots // size, :, 0, slots % size] = k[given]
        blocks[slots // size, :, 1, slots % size] = v[given]
        out = torch.empty(q.shape, dtype=q.dtype)
        starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
        for row, length in enumerate(lengths):
            own = slice(starts[row], starts[row + 1])
            table = batch.block_tables[row, : -(-length // size)].long()
            held = blocks[table].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :length]
            queries = starts[row + 1] - starts[row]
            position = torch.arange(length - queries, length)[:, None]
            key = torch.arange(length)[None, :]
            visible = key <= position
            if layer.window:
                visible &= key > position - layer.window
            out[own] = scaled_dot_product_attention(
                q[own].transpose(0, 1)[None], held[0][None], held[1][None],
                attn_mask=visible, scale=layer.scale, enable_gqa=True,
            )[0].transpose(0, 1)  # fmt: skip
        return out

    def copy_blocks(self, pool: KVPool, moves: Sequence[BlockMove]) -> None:
        self._move(pool, pool, moves)

    def swap_out(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self._move(pool, host, moves)

    def swap_in(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self._move(host, pool, moves)

    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        return pool.data[:, list(blocks)].permute(3, 0, 1, 4, 2, 5).contiguous()

    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        pool.data[:, list(blocks)] = data.permute(1, 2, 4, 0, 3, 5)

    @staticmethod
    def _move(source: KVPool, target: KVPool, moves: Sequence[BlockMove]) -> None:
        if moves:
            sources, targets = (list(ids) for ids in zip(*moves, strict=True))
            target.data[:, targets] = source.data[:, sources]
