"""Compiles generated functions for this machine: once a shape, kept in memory and on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halyard.hal import fallbacks
from halyard.hal.errors import BackendUnavailableError
from halyard.hal.kernels.tvm.shape import KernelShape, MoveShape

__all__ = ["TVM_INSTALL", "cpu_target", "gpu_target", "load_functions"]

logger = logging.getLogger(__name__)

TVM_INSTALL = 'pip install "halyard[tvm]"'
_FOLDER = Path(__file__).parent
_DIGEST = 32  # bytes


@functools.cache
def cpu_target() -> Any:
    """LLVM for the CPU that this runs on."""
    import tvm

    # `-mcpu=native` is taken for "generic" with no more than a line in the log.
    return tvm.target.Target(
        {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": 1}
    )


def gpu_target(kind: str, arch: str) -> Any:
    """A GPU's target, host code by LLVM. `arch` is CUDA's "sm_90"; other kinds take none."""
    import tvm

    facts: dict[str, Any] = {"kind": kind}
    if kind == "cuda":
        facts |= {"arch": arch, "max_threads_per_block": 1024, "thread_warp_size": 32}
    return tvm.target.Target(facts, host={"kind": "llvm"})


def load_functions(
    shape: KernelShape | MoveShape,
    target: Any,
    make: Callable[[], dict[str, Any]],
    variant: str = "",
) -> dict[str, Any]:
    """The compiled functions of a shape by name, from the disk if they are there.

    Args:
        make: makes the functions' TIR; called only if they must be compiled.
        variant: what else decides the code.

    Raises:
        BackendUnavailableError: TVM can't compile them.
    """
    import tvm

    path = _path(shape, str(target), variant) if target.kind.name == "llvm" else None
    if path is not None and _is_whole(path):
        try:
            return _functions(tvm.runtime.load_module(str(path)), _names(shape, target))
        except Exception as error:  # noqa: BLE001 - whatever the damage, compiling anew mends it
            fallbacks.note("kernel_cache", f"discarding a damaged TVM kernel {path}: {error}")
    started = time.perf_counter()
    try:
        executable = tvm.compile(tvm.IRModule(make()), target=target)
    except Exception as error:
        reason = " ".join(str(error).split())[-300:]
        raise BackendUnavailableError(f"TVM can't compile its kernels: {reason}") from error
    logger.info("compiled TVM kernels %s in %.1f s", shape.name, time.perf_counter() - started)
    if path is not None:
        _store(executable, path)
    return _functions(executable.jit(), _names(shape, target))


def _names(shape: KernelShape | MoveShape, target: Any) -> tuple[str, ...]:
    if isinstance(shape, MoveShape):
        return ("move",)
    names = ("write", "decode", "prefill")
    return names if target.kind.name == "llvm" else (*names, "decode_split", "merge")


def _functions(module: Any, names: tuple[str, ...]) -> dict[str, Any]:
    # Looking a function up takes longer than calling it: once is enough.
    return {name: module[name] for name in names}


def _path(shape: KernelShape | MoveShape, target: str, variant: str) -> Path:
    import tvm

    root = os.environ.get("HALYARD_CACHE_DIR")
    folder = (Path(root) if root else Path.home() / ".cache" / "halyard") / "tvm"
    digest = hashlib.sha256(f"{tvm.__version__} {target} {variant} {platform.machine()}".encode())
    for file in sorted(_FOLDER.glob("*.py")):
        digest.update(file.read_bytes())
    return folder / f"{shape.name}-{digest.hexdigest()[:16]}.so"


def _is_whole(path: Path) -> bool:
    """Loading a library that was cut short can end the process: its digest stands at its end."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]


def _store(executable: Any, path: Path) -> None:
    """Write atomically, so that two processes can race. Without a linker nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            library = Path(scratch) / "kernels.so"
            executable.export_library(str(library))
            digest = hashlib.sha256(library.read_bytes()).digest()
            with library.open("ab") as file:
                file.write(digest)
            os.replace(library, path)
    except Exception as error:  # noqa: BLE001 - a cache: no linker, a full disk, a read-only home
        told = " ".join(str(error).split())
        fallbacks.note("kernel_cache", f"TVM kernels are not kept on disk: {told}")
