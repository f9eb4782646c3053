"""A "new accelerator" that stands for yours: memory of its own size, work done when a call returns."""

from __future__ import annotations

from collections.abc import Callable

import torch

from halyard.hal.contract import CONTRACT_VERSION
from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import CapacityError
from halyard.hal.types import DeviceInfo, KVLayout, KVPool, MemoryInfo, Probe

__all__ = ["SlateDevice"]

MEMORY = 2 << 30  # bytes on the board


class SlateDevice:
    """One slate board."""

    contract_version = CONTRACT_VERSION

    def __init__(self) -> None:
        info = self.probe().info
        if info is None:
            raise AssertionError("it was probed before it was opened")
        self.info = info
        self.torch_device = torch.device("cpu")  # where torch keeps this device's tensors

    @classmethod
    def probe(cls) -> Probe:
        info = DeviceInfo("slate", "acme", "slate1", "Slate One", MEMORY, 1)
        return Probe(True, info=info, versions={"slate-driver": "1.0"})

    def memory(self) -> MemoryInfo:
        return MemoryInfo(MEMORY, MEMORY)

    def allocate_kv(self, layout: KVLayout, num_blocks: int, *, host: bool) -> KVPool:
        size = num_blocks * layout.bytes_per_block
        if size > self.memory().free:
            raise CapacityError(
                f"{num_blocks} KV blocks need {size >> 20} MiB, {self.memory().free >> 20} MiB are "
                "free on the slate: ask for fewer (--kv-blocks, --host-kv-blocks)"
            )
        shape = (layout.spec.num_layers, num_blocks, *layout.block_shape)
        return KVPool(layout, num_blocks, host, torch.empty(shape, dtype=torch_dtype(layout.dtype)))

    def capture(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        return None  # nothing to record

    def synchronize(self) -> None:
        return None

    def close(self) -> None:
        return None
