"""An NVIDIA GPU as a device."""

from __future__ import annotations

import os
from typing import Any

import torch

from halyard.hal.devices.gpu import GpuDevice
from halyard.hal.devices.nvml import NvidiaGpu, read_gpu
from halyard.hal.errors import BackendUnavailableError
from halyard.hal.types import DeviceInfo, DType, Probe

__all__ = ["CudaDevice"]

_LEAST = (8, 0)  # bfloat16 on the matrix units, asynchronous copies
# Oldest driver for a major version of CUDA (minor versions are compatible among themselves).
_DRIVERS = {11: 450, 12: 525, 13: 580}


class CudaDevice(GpuDevice):
    """The first GPU of CUDA_VISIBLE_DEVICES."""

    @classmethod
    def probe(cls) -> Probe:
        reasons = []
        versions = {"torch": str(torch.__version__)}
        cuda = torch.version.cuda
        if cuda is None:
            reasons.append(
                f"torch here ({torch.__version__}) is built without CUDA: pip install a CUDA build "
                "of torch"
            )
        else:
            versions["cuda"] = cuda
        try:
            gpu = read_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
        except BackendUnavailableError as error:
            return Probe(False, (*reasons, str(error)), versions=versions)
        versions["driver"] = gpu.driver
        if gpu.capability < _LEAST:
            reasons.append(
                f"{gpu.name} has compute capability {_dotted(gpu.capability)}: "
                f"{_dotted(_LEAST)} is the least that is supported"
            )
        if cuda is not None:
            least = _DRIVERS.get(int(cuda.split(".")[0]), 0)
            major = gpu.driver.split(".")[0]
            if major.isdigit() and int(major) < least:
                reasons.append(
                    f"driver {gpu.driver} is too old for torch's CUDA {cuda}: it needs {least} or "
                    "later"
                )
        return Probe(not reasons, tuple(reasons), _info(gpu), versions)

    @staticmethod
    def arch_of(properties: Any) -> str:
        return f"sm_{properties.major}{properties.minor}"


def _info(gpu: NvidiaGpu) -> DeviceInfo:
    native: tuple[DType, ...] = ("bfloat16", "float16", "float32")
    major, minor = gpu.capability
    return DeviceInfo(
        kind="cuda",
        vendor="nvidia",
        arch=f"sm_{major}{minor}",
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        num_cores=gpu.num_cores,
        native_dtypes=native if gpu.capability >= _LEAST else native[1:],
        bandwidth_bytes_per_second=gpu.bandwidth,
        link_bytes_per_second=gpu.link,
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
