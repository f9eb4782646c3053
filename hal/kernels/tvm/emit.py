"""Sources of the TVM kernels for GPUs that may not be here, generated in processes of their own.

A code generator that crashes ends its process, and no other: `emit_source` reports it. What comes
out has been generated, no more; nothing here runs it. As a program: `python -m
halyard.hal.kernels.tvm.emit TARGET SHAPE FILE` writes one target's source, SHAPE in JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from halyard.hal.kernels.tvm.shape import KernelShape, MoveShape
from halyard.hal.types import ITEM_SIZE

__all__ = ["KERNELS", "TARGETS", "Emission", "emit_source"]

Status = Literal["generated", "failed", "crashed", "timeout"]

KERNELS = ("write", "decode", "decode_split", "merge", "prefill", "move")

# target -> the dtypes that its language has; ROCm is compiled to assembly.
TARGETS: dict[str, tuple[str, ...]] = {
    "cuda": ("float32", "float16", "bfloat16"),
    "rocm": ("float32", "float16", "bfloat16"),
    "metal": ("float32", "float16"),
    "opencl": ("float32", "float16"),
    "webgpu": ("float32", "float16"),
}
_ARCH = {"cuda": "sm_90", "rocm": "gfx942"}
_SHAPE = (32, 8, 128, 16)  # heads, kv heads, head dim, block: a common model's


@dataclass(frozen=True, slots=True)
class Emission:
    """One target's and dtype's source: the functions named by KERNELS."""

    target: str
    dtype: str
    status: Status
    seconds: float
    reason: str = ""  # one line, unless generated
    source: str = ""

    @property
    def kernels(self) -> int:
        """How many of KERNELS are in the source."""
        return sum(f"{name}_kernel" in self.source for name in KERNELS)


def emit_source(
    target: str, dtype: str, timeout: float = 120.0, shape: KernelShape | None = None
) -> Emission:
    """Generate in a fresh process, killed after `timeout` seconds. Never raises for what fails.

    Args:
        shape: what to generate for; None: a common model's, in `dtype`.
    """
    facts = json.dumps(asdict(shape or KernelShape(*_SHAPE, dtype)))
    command = [sys.executable, "-m", __name__, target, facts]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "source"
        try:
            done = subprocess.run(
                [*command, str(file)], capture_output=True, text=True, timeout=timeout,
                check=False, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Emission(target, dtype, "timeout", timeout, f"no end after {timeout:.0f} s")
        seconds = time.perf_counter() - started
        if done.returncode == 0:
            return Emission(target, dtype, "generated", seconds, source=file.read_text())
    last = (done.stderr.strip().splitlines() or ["no message"])[-1].strip()
    if done.returncode < 0:
        return Emission(target, dtype, "crashed", seconds, f"signal {-done.returncode}: {last}")
    return Emission(target, dtype, "failed", seconds, last)


def _target(kind: str) -> Any:
    import tvm

    from halyard.hal.kernels.tvm.build import gpu_target

    if kind != "rocm":
        return gpu_target(kind, _ARCH.get(kind, ""))
    facts = {"kind": kind, "mcpu": _ARCH[kind], "mtriple": "amdgcn-amd-amdhsa-hcc"}
    return tvm.target.Target(facts, host={"kind": "llvm"})


def _without_vendor_tools() -> None:
    """Keep TVM from calling compilers of vendors: their libraries and linkers aren't here."""
    import tvm
    import tvm_ffi

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", lambda code, *_: code, override=True)
    # Only what LLVM lowers natively can then be used: exp2 and the like, but no tanh.
    tvm_ffi.register_global_func(
        "tvm_callback_rocm_bitcode_path", lambda *_: tvm.runtime.convert([]), override=True
    )
    tvm_ffi.register_global_func(
        "tvm_callback_rocm_link", lambda code: bytearray(code), override=True
    )


def _main(kind: str, facts: str, file: str) -> None:
    import tvm

    from halyard.hal.kernels.tvm.gpu import gpu_functions
    from halyard.hal.kernels.tvm.moves import gpu_move

    _without_vendor_tools()
    # WebGPU has no 64-bit integers.
    shape = KernelShape(**json.loads(facts))
    index = "int32" if kind == "webgpu" else "int64"
    words = 2 * shape.num_kv_heads * shape.head_dim * shape.block_size
    words = words * ITEM_SIZE[shape.dtype] // 4
    functions = gpu_functions(shape, index) | {"move": gpu_move(MoveShape(words), index)}
    built = tvm.compile(tvm.IRModule(functions), target=_target(kind))
    (module,) = built.mod.imports
    Path(file).write_text(module.inspect_source("asm" if kind == "rocm" else ""))


if __name__ == "__main__":
    _main(*sys.argv[1:])
