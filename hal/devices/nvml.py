"""What NVIDIA's driver says about a GPU, by ctypes: NVML opens no context. No torch here."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from halyard.hal.errors import BackendUnavailableError

__all__ = ["NvidiaGpu", "read_gpu"]

_MEMORY_CLOCK = 2
# CUDA cores a multiprocessor has; NVML counts cores. Others: 128.
_CORES_PER_MULTIPROCESSOR = {70: 64, 72: 64, 75: 64, 80: 64}
# Bytes a second and lane, by PCIe generation, after line coding.
_LANE: dict[int, float] = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}


@dataclass(frozen=True, slots=True)
class NvidiaGpu:
    """One GPU. 0 or None: the driver doesn't say (a virtual GPU, a MIG slice)."""

    name: str
    driver: str  # "580.65.06"
    capability: tuple[int, int]
    memory_bytes: int
    num_cores: int  # multiprocessors
    bandwidth: float | None  # bytes a second, of the memory's clock and width
    link: float | None  # bytes a second, of the slot, one way


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def read_gpu(visible: str | None) -> NvidiaGpu:
    """The first visible GPU.

    Args:
        visible: CUDA_VISIBLE_DEVICES: "1,0", "GPU-1234..", "MIG-..", None: all.

    Raises:
        BackendUnavailableError: no driver, or no such GPU; the text says what mends it.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise BackendUnavailableError(
            "no NVIDIA driver (libnvidia-ml.so.1 is not there): install one, or start the "
            "container with GPUs"
        ) from None
    if status := library.nvmlInit_v2():
        raise BackendUnavailableError(
            f"the NVIDIA driver doesn't answer (NVML error {status}): is its module loaded? see "
            "nvidia-smi"
        )
    try:
        return _read(library, visible)
    finally:
        library.nvmlShutdown()


def _read(library: Any, visible: str | None) -> NvidiaGpu:
    handle = _find(library, visible)

    def text(call: Any, *head: Any) -> str:
        buffer = ctypes.create_string_buffer(96)
        return "" if call(*head, buffer, 96) else buffer.value.decode(errors="replace")

    def number(call: str, *head: Any) -> int:
        value = ctypes.c_uint()
        return 0 if getattr(library, call)(handle, *head, ctypes.byref(value)) else value.value

    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    memory = _Memory()
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    cores = number("nvmlDeviceGetNumGpuCores")
    per_core = _CORES_PER_MULTIPROCESSOR.get(major.value * 10 + minor.value, 128)
    width = number("nvmlDeviceGetMemoryBusWidth")  # bits
    clock = number("nvmlDeviceGetMaxClockInfo", _MEMORY_CLOCK)  # MHz, two transfers a cycle
    lanes = number("nvmlDeviceGetMaxPcieLinkWidth")
    lane = _LANE.get(number("nvmlDeviceGetMaxPcieLinkGeneration"), 0.0)
    return NvidiaGpu(
        name=text(library.nvmlDeviceGetName, handle),
        driver=text(library.nvmlSystemGetDriverVersion),
        capability=(major.value, minor.value),
        memory_bytes=memory.total,
        num_cores=cores // per_core,
        bandwidth=clock * 1e6 * 2 * width / 8 or None,
        link=lanes * lane or None,
    )


def _find(library: Any, visible: str | None) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    first = "0" if visible is None else visible.split(",")[0].strip()
    if not count.value:
        raise BackendUnavailableError("the NVIDIA driver sees no GPU: is one passed through?")
    if first in ("", "-1", "NoDevFiles"):
        raise BackendUnavailableError(
            f"CUDA_VISIBLE_DEVICES hides every GPU: unset it, or name one of 0..{count.value - 1}"
        )
    if first.isdigit():
        status = (
            library.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(handle))
            if int(first) < count.value
            else 1
        )
    else:
        status = library.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(handle))
    if status:
        raise BackendUnavailableError(
            f"CUDA_VISIBLE_DEVICES names {first!r}, which is not here: there are {count.value} GPUs"
        )
    return handle
