"""An AMD GPU as a device. Found in the kernel driver's topology: no library, no context."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halyard.hal.devices.gpu import GpuDevice
from halyard.hal.types import DeviceInfo, DType, Probe

__all__ = ["KFD_NODES", "RocmDevice", "read_nodes"]

KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
_KFD_DEVICE = Path("/dev/kfd")
_DRIVER_VERSION = Path("/sys/module/amdgpu/version")
_DRM = Path("/sys/class/drm")
_LOCAL_HEAPS = (1, 2)  # frame buffer, visible to the host or not
_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class _AmdGpu:
    arch: str
    name: str
    memory_bytes: int
    num_cores: int  # compute units
    bandwidth: float | None  # bytes a second


class RocmDevice(GpuDevice):
    """The first GPU of HIP_VISIBLE_DEVICES."""

    @classmethod
    def probe(cls) -> Probe:
        reasons = []
        versions = {"torch": str(torch.__version__)}
        hip = torch.version.hip
        if hip is None:
            reasons.append(
                f"torch here ({torch.__version__}) is built without ROCm: pip install a ROCm build "
                "of torch"
            )
        else:
            versions["hip"] = hip
        driver = _text(_DRIVER_VERSION)
        if driver:
            versions["driver"] = driver
        gpus = read_nodes(KFD_NODES)
        if not gpus:
            reasons.append(
                "no AMD GPU (none in the kernel's topology): load the amdgpu driver, or start the "
                "container with /dev/kfd and /dev/dri"
            )
            return Probe(False, tuple(reasons), versions=versions)
        if not os.access(_KFD_DEVICE, os.R_OK | os.W_OK):
            reasons.append(
                "/dev/kfd may not be opened: add the user to the groups render and video"
            )
        index, problem = _first_visible(len(gpus))
        if problem:
            reasons.append(problem)
        return Probe(not reasons, tuple(reasons), _info(gpus[index]), versions)

    @staticmethod
    def arch_of(properties: Any) -> str:
        return str(properties.gcnArchName).split(":")[0]  # "gfx942:sramecc+:xnack-"


def read_nodes(nodes: Path) -> list[_AmdGpu]:
    """The GPUs of a topology folder, in the driver's order; CPUs are nodes too and left out."""
    if not nodes.is_dir():
        return []
    found = []
    for node in sorted(nodes.iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1):
        properties = _numbers(node / "properties")
        if not properties.get("simd_count"):
            continue
        banks = [_numbers(bank / "properties") for bank in node.glob("mem_banks/*")]
        local = [bank for bank in banks if bank.get("heap_type") in _LOCAL_HEAPS]
        # Clock in MHz, width in bits, two transfers a cycle.
        rates = [b.get("mem_clk_max", 0) * 1e6 * 2 * b.get("width", 0) / 8 for b in local]
        arch = _arch(properties.get("gfx_target_version", 0))
        product = _DRM / f"renderD{properties.get('drm_render_minor', 0)}/device/product_name"
        found.append(
            _AmdGpu(
                arch=arch,
                name=_text(product) or f"AMD {arch}",
                memory_bytes=sum(bank.get("size_in_bytes", 0) for bank in local),
                num_cores=properties["simd_count"] // max(properties.get("simd_per_cu", 1), 1),
                bandwidth=max(rates, default=0.0) or None,
            )
        )
    return found


def _arch(version: int) -> str:
    """90402 -> "gfx942", 90010 -> "gfx90a": minor and stepping are hexadecimal digits."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _first_visible(count: int) -> tuple[int, str | None]:
    """Which GPU the runtime will call the first, and what is wrong with the choice."""
    for name in _VISIBLE:
        first = os.environ.get(name, "0").split(",")[0].strip()
        if name not in os.environ or first.upper().startswith("GPU-"):
            continue
        if not first.isdigit() or int(first) >= count:
            return 0, f"{name} names {first!r}, which is not here: there are {count} GPUs"
        return int(first), None
    return 0, None


def _info(gpu: _AmdGpu) -> DeviceInfo:
    # RDNA 2 and older have no matrix instructions, and no bfloat16.
    native: tuple[DType, ...] = ("bfloat16", "float16", "float32")
    has_matrix = gpu.arch.startswith(("gfx9", "gfx11", "gfx12"))
    return DeviceInfo(
        kind="rocm",
        vendor="amd",
        arch=gpu.arch,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        num_cores=gpu.num_cores,
        native_dtypes=native if has_matrix else native[1:],
        bandwidth_bytes_per_second=gpu.bandwidth,
    )


def _numbers(file: Path) -> dict[str, int]:
    """A file of `name number` lines; empty if it isn't ours to read."""
    pairs = (line.split() for line in _text(file).splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # not there, or not ours to read
        return ""
