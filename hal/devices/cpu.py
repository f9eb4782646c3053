"""The CPU as a device: memory is the process's own, work is done when a call returns."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache

import torch

from halyard.hal import cpuinfo
from halyard.hal.contract import CONTRACT_VERSION
from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import CapacityError
from halyard.hal.types import DeviceInfo, DType, KVLayout, KVPool, MemoryInfo, Probe

__all__ = ["CpuDevice", "measure_read_bandwidth"]

# Linux's flag -> the name kernels and compilers go by.
_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512dq": "avx512dq",
    "avx512_bf16": "avx512bf16",
    "amx_bf16": "amxbf16",
    "asimd": "neon",
    "bf16": "armbf16",
}


class CpuDevice:
    """All the cores that this process may use, as one device: OMP_NUM_THREADS may leave some out."""

    contract_version = CONTRACT_VERSION

    def __init__(self) -> None:
        info = self.probe().info
        if info is None:
            raise AssertionError("a CPU is always there")
        self.info = info
        self.torch_device = torch.device("cpu")
        torch.set_num_threads(info.num_cores)

    @classmethod
    def probe(cls) -> Probe:
        flags = cpuinfo.cpu_flags()
        features = tuple(name for flag, name in _FEATURES.items() if flag in flags)
        native: tuple[DType, ...] = ("float32",)
        if {"avx512bf16", "amxbf16", "armbf16"} & set(features):
            native = ("bfloat16", "float32")
        info = DeviceInfo(
            kind="cpu",
            vendor=cpuinfo.cpu_vendor(),
            arch=platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64"),
            name=cpuinfo.cpu_name(),
            memory_bytes=cpuinfo.memory_limit(),
            num_cores=cpuinfo.num_threads(),
            features=features,
            native_dtypes=native,
        )
        return Probe(True, info=info, versions={"torch": torch.__version__})

    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=cpuinfo.memory_limit(), free=cpuinfo.memory_available())

    def allocate_kv(self, layout: KVLayout, num_blocks: int, *, host: bool) -> KVPool:
        size = num_blocks * layout.bytes_per_block
        free = self.memory().free
        if size > free:
            raise CapacityError(
                f"{num_blocks} KV blocks need {size / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB "
                "are free: ask for fewer (--kv-blocks, --host-kv-blocks) or a shorter "
                "--max-model-len"
            )
        data = torch.empty(
            (layout.spec.num_layers, num_blocks, *layout.block_shape),
            dtype=torch_dtype(layout.dtype),
        )
        return KVPool(layout, num_blocks, host, data)

    def capture(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        return None

    def synchronize(self) -> None:
        return None

    def close(self) -> None:
        return None


@cache
def measure_read_bandwidth(num_bytes: int = 1 << 28) -> float:
    """Bytes a second that all cores together read from memory, measured once a process."""
    import time

    data = torch.ones(num_bytes // 4)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        data.sum()
        best = max(best, num_bytes / (time.perf_counter() - started))
    return best
