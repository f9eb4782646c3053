"""Finds the parts of the three axes: those in the tree, and those other distributions bring.

A part is named on its axis ("native" on "kernels"). Out-of-tree parts are entry points of the
groups halyard.devices, halyard.kernels and halyard.graphs. Importing is lazy; a part that can't be
imported is a reason, never a crash and never silence.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

from halyard.hal.contract import CONTRACT_VERSION
from halyard.hal.errors import ConfigError, ContractError
from halyard.hal.types import DeviceInfo, Probe

__all__ = ["AXES", "Axis", "load_part", "part_names", "part_problem", "probe_device", "probe_part"]

Axis = Literal["devices", "kernels", "graphs"]
AXES: tuple[Axis, ...] = ("devices", "kernels", "graphs")

# Those in the tree, so that a bare checkout works without being installed.
_BUILT_IN: dict[Axis, dict[str, str]] = {
    "devices": {
        "cpu": "halyard.hal.devices.cpu:CpuDevice",
        "cuda": "halyard.hal.devices.cuda:CudaDevice",
        "rocm": "halyard.hal.devices.rocm:RocmDevice",
    },
    "kernels": {
        "null": "halyard.hal.kernels.null:NullKernels",
        "reference": "halyard.hal.kernels.reference.kernels:ReferenceKernels",
        "native": "halyard.hal.kernels.native.kernels:NativeKernels",
        "triton": "halyard.hal.kernels.triton.kernels:TritonKernels",
        "tvm": "halyard.hal.kernels.tvm.kernels:TvmKernels",
    },
    "graphs": {
        "null": "halyard.compiler.graphs.null:NullCompiler",
        "eager": "halyard.compiler.graphs.eager:EagerCompiler",
        "inductor": "halyard.compiler.graphs.inductor:InductorCompiler",
        "onnxruntime": "halyard.compiler.graphs.onnxruntime:OnnxRuntimeCompiler",
        "tvm": "halyard.compiler.graphs.tvm:TvmCompiler",
    },
}


@cache
def _targets(axis: Axis) -> dict[str, str]:
    found = {point.name: point.value for point in entry_points(group=f"halyard.{axis}")}
    return found | _BUILT_IN[axis]


def part_names(axis: Axis) -> tuple[str, ...]:
    """Names that exist on an axis, whether or not they can run here."""
    return tuple(sorted(_targets(axis)))


@cache
def load_part(axis: Axis, name: str) -> Any:
    """The class of a part.

    Raises:
        ConfigError: there is no such part.
        ContractError: it was built for another major version of the contract.
        ImportError: a library it needs is missing.
    """
    target = _targets(axis).get(name)
    if target is None:
        raise ConfigError(
            f"no {axis} part {name!r}: known are {', '.join(part_names(axis)) or 'none'}"
        )
    module, _, attribute = target.partition(":")
    part = getattr(importlib.import_module(module), attribute)
    version = getattr(part, "contract_version", None)
    if version is None or version[0] != CONTRACT_VERSION[0]:
        built = ".".join(map(str, version)) if version else "no"
        raise ContractError(
            f"{axis} part {name!r} was built for contract {built}, this is "
            f"{CONTRACT_VERSION[0]}.{CONTRACT_VERSION[1]}: install a matching version of it"
        )
    return part


def _load_or_reason(axis: Axis, name: str) -> tuple[Any, str | None]:
    try:
        return load_part(axis, name), None
    except (ConfigError, ContractError) as error:
        return None, str(error)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        package = missing.split(".")[0]
        if package == "halyard":  # ours: nothing to install, a module is gone
            return None, f"{axis} part {name!r} can't be imported: there is no module {missing}"
        return None, f"{axis} part {name!r} needs {package}: pip install {package}"
    except Exception as error:  # noqa: BLE001 - other people's module may raise anything; it is told
        told = " ".join(str(error).split())
        return None, f"{axis} part {name!r} can't be imported: {type(error).__name__}: {told}"


def probe_device(name: str) -> Probe:
    """Is that device here? Never raises for what is merely missing."""
    part, reason = _load_or_reason("devices", name)
    if reason is not None:
        return Probe(False, (reason,))
    found: Probe = part.probe()
    return found


def part_problem(axis: Axis, name: str) -> str | None:
    """Why a part can't even be loaded, or None. Asks nothing of the hardware."""
    return _load_or_reason(axis, name)[1]


def probe_part(axis: Axis, name: str, device: DeviceInfo) -> Probe:
    """Can those kernels, or that graph compiler, run on that device here?"""
    part, reason = _load_or_reason(axis, name)
    if reason is not None:
        return Probe(False, (reason,))
    found: Probe = part.probe(device)
    return found
