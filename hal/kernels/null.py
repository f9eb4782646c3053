"""Kernels that compute nothing and count calls: they drive scheduler, engine and API tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from halyard.hal.contract import CONTRACT_VERSION, Device
from halyard.hal.dtypes import torch_dtype
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

__all__ = ["NullKernels"]


class NullKernels:
    """Any model, any size; a block takes one element a layer."""

    contract_version = CONTRACT_VERSION
    name = "null"
    capabilities = Capabilities(
        dtypes=("float32", "float16", "bfloat16"),
        kv_dtypes=("float32", "float16", "bfloat16"),
        block_sizes=tuple(range(1, 257)),
        head_dims=None,
        max_gqa_ratio=None,
    )

    def __init__(self, device: Device) -> None:
        self.device = device
        self.calls: Counter[str] = Counter()  # calls by method; moves count blocks

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        return Probe(True)

    def layout(self, spec: KVSpec) -> KVLayout:
        return KVLayout(spec, (1,), spec.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        self.calls["attend"] += 1
        return torch.zeros_like(q)

    def copy_blocks(self, pool: KVPool, moves: Sequence[BlockMove]) -> None:
        self.calls["copy_blocks"] += len(moves)

    def swap_out(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self.calls["swap_out"] += len(moves)

    def swap_in(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self.calls["swap_in"] += len(moves)

    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        spec = pool.layout.spec
        shape = (2, spec.num_layers, len(blocks), spec.block_size, spec.num_kv_heads, spec.head_dim)
        return torch.zeros(shape, dtype=torch_dtype(spec.dtype))

    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        self.calls["write_blocks"] += len(blocks)
