"""What a device can do at most: measured on this machine, the most that was ever seen kept on disk.

A GPU is measured once. A CPU is often shared, and what it gives changes: it is measured each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halyard.compiler.cache import default_directory
from halyard.hal.contract import Device
from halyard.hal.dtypes import torch_dtype
from halyard.hal.types import DType

if TYPE_CHECKING:
    from halyard.runtime.work import Work

__all__ = ["DeviceLimits", "device_limits", "measure_limits"]

_VERSION = 2  # of the file's content and of how it is measured
_SECONDS = 0.4  # for each rate


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Rates measured with plain torch."""

    bytes_per_second: float  # memory: read alone on a CPU; a copy's reads and writes elsewhere
    flops_per_second: float  # of a square matrix product in `dtype`
    link_bytes_per_second: float | None  # host to device, pinned; None: they share memory
    dtype: DType

    def highest(self, other: DeviceLimits) -> DeviceLimits:
        """The higher of each rate."""
        return replace(
            self,
            bytes_per_second=max(self.bytes_per_second, other.bytes_per_second),
            flops_per_second=max(self.flops_per_second, other.flops_per_second),
        )

    def least_seconds(self, work: Work) -> float:
        """What the work must take if memory and arithmetic are each at their limit, overlapping."""
        return max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)


def device_limits(device: Device, dtype: DType, cache_dir: Path | None = None) -> DeviceLimits:
    """From the file of this machine, or measured now and written there; a CPU's are the highest seen."""
    facts = {
        "version": _VERSION,
        "device": [device.info.kind, device.info.name, device.info.arch, device.info.num_cores],
        "torch": torch.__version__,
        "dtype": dtype,
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file = (cache_dir or default_directory()) / "limits" / f"{name}.json"
    known = None
    try:
        found = json.loads(file.read_text())
        if found["facts"] == facts:
            known = DeviceLimits(**found["limits"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours: measured anew
    if known is not None and device.info.kind != "cpu":
        return known
    limits = measure_limits(device, dtype)
    if known is not None:
        limits = limits.highest(known)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps({"facts": facts, "limits": asdict(limits)}, indent=1))
    written.replace(file)
    return limits


@contextmanager
def _all_cores(device: Device) -> Iterator[None]:
    """Torch may have left a CPU's cores to our kernels."""
    before = torch.get_num_threads()
    if device.info.kind == "cpu":
        torch.set_num_threads(device.info.num_cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_limits(device: Device, dtype: DType) -> DeviceLimits:
    """Measure a device that nothing else uses meanwhile; takes about a second."""
    where, kind = device.torch_device, torch_dtype(dtype)
    on_cpu = where.type == "cpu"

    def rate(amount: float, work: Callable[[], Any]) -> float:
        """Most of `amount` a second."""
        work()
        device.synchronize()
        best, until = 0.0, time.perf_counter() + _SECONDS
        while time.perf_counter() < until:
            began = time.perf_counter()
            work()
            device.synchronize()
            best = max(best, amount / (time.perf_counter() - began))
        return best

    with torch.inference_mode(), _all_cores(device):
        size = (1 << 28) if on_cpu else min(1 << 30, device.memory().free // 4)
        data = torch.ones(size // 4, device=where)
        if on_cpu:
            bandwidth = rate(size, data.sum)
        else:
            other = torch.empty_like(data)
            bandwidth = rate(2 * size, lambda: other.copy_(data))
        link = None
        if not on_cpu:
            host = torch.empty(1 << 26, dtype=torch.float32, pin_memory=True)
            target = data[: len(host)]
            link = rate(4 * len(host), lambda: target.copy_(host[: len(target)], non_blocking=True))
        side = 2048 if on_cpu else 8192
        left = torch.ones(side, side, dtype=kind, device=where)
        flops = rate(2.0 * side**3, lambda: left @ left)
    return DeviceLimits(bandwidth, flops, link, dtype)
