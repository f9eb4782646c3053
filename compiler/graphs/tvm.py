"""TVM's relax: every unique segment becomes one function of its virtual machine, linears torch's.

Tensors go in and come out without copies. What lies between two linears is fused into loops; the
linears themselves are calls back to torch, whose library is far ahead of TVM's default loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.dlpack import from_dlpack

from halyard.compiler.graphs.tvm_translate import LINEAR, segment_module
from halyard.hal.contract import CONTRACT_VERSION, Executable
from halyard.hal.errors import BackendUnavailableError, ModelError
from halyard.hal.types import DeviceInfo, Probe

__all__ = ["TvmCompiler"]

_ALIGNMENT = 64  # bytes: torch's own tensors begin there, arrays and files' parts need not
_LIBRARY = "segment.so"
_INSTALL = 'pip install "halyard[tvm]"'


class _Segment:
    """A compiled segment: positional tensors in, a tuple of tensors out."""

    def __init__(self, module: Any) -> None:
        import tvm

        _register_linear()
        self.module = module
        self._machine = tvm.relax.VirtualMachine(module, tvm.cpu())
        self._main = self._machine["main"]  # looking it up costs as much as a small segment

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = self._main(*map(_aligned, inputs))
        return tuple(x if isinstance(x, Tensor) else from_dlpack(x) for x in made)


def _aligned(tensor: Tensor) -> Tensor:
    """TVM's loops read whole vectors, and end the process where one begins between two."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


class TvmCompiler:
    """Compiles float32 segments for the CPU."""

    contract_version = CONTRACT_VERSION
    name = "tvm"

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        reasons = []
        versions = {}
        if device.kind != "cpu":
            reasons.append(f"the tvm graph compiler runs on the cpu, not on {device.kind}")
        if find_spec("tvm") is None:
            reasons.append(f"the tvm graph compiler needs TVM: {_INSTALL}")
        else:
            for package in ("apache-tvm", "apache-tvm-ffi"):
                try:
                    versions[package] = version(package)
                except PackageNotFoundError:
                    versions[package] = "unknown"
        return Probe(not reasons, tuple(reasons), versions=versions)

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        return ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input")

    def fingerprint(self) -> str:
        """What, beside torch and the device, decides the code that comes out."""
        return " ".join(version(package) for package in ("apache-tvm", "apache-tvm-ffi"))

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        found = self.probe(device)
        if not found.available:
            raise BackendUnavailableError(f"tvm can't run here: {'; '.join(found.reasons)}")
        for tensor in inputs:
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise BackendUnavailableError(
                    f"tvm graphs compute in float32, not in {dtype}: use --dtype float32 or "
                    "another backend"
                )
        import tvm
        from tvm import relax

        from halyard.hal.kernels.tvm.build import cpu_target

        module = segment_module(segment)
        target = cpu_target()
        try:
            built = tvm.compile(
                module, target=target, relax_pipeline=relax.get_default_pipeline(target)
            )
        except Exception as error:
            reason = " ".join(str(error).split())[-300:]
            raise ModelError(f"TVM can't compile a segment of this model: {reason}") from error
        return _Segment(built)

    def save(self, executable: Executable, directory: Path) -> bool:
        if not isinstance(executable, _Segment) or not hasattr(executable.module, "export_library"):
            return False
        directory.mkdir(parents=True, exist_ok=True)
        executable.module.export_library(str(directory / _LIBRARY))
        return True

    def load(self, directory: Path, device: DeviceInfo) -> Executable:
        import tvm

        return _Segment(tvm.runtime.load_module(str(directory / _LIBRARY)))


@cache
def _register_linear() -> None:
    """Give TVM torch's linear under the name that segments call."""
    import tvm_ffi

    def linear(*tensors: Any) -> None:
        x, weight, *bias, out = (from_dlpack(tensor) for tensor in tensors)
        flat, made = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if bias:
            torch.addmm(bias[0], flat, weight.t(), out=made)
        else:
            torch.mm(flat, weight.t(), out=made)

    tvm_ffi.register_global_func(LINEAR, linear, override=True)
