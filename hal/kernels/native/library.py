"""Builds the C++ library where it runs and loads it. No torch headers: seconds, and any C++17 compiler.

The library is kept in the user's cache under a digest of source, flags and compiler, so that it is
built once a machine; writing is atomic, so two processes can race.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from halyard.hal.cpuinfo import num_cpus
from halyard.hal.errors import BackendUnavailableError

__all__ = [
    "BASE_FLAGS",
    "ISA_LEVELS",
    "MIN_PARALLEL_WORK",
    "SOURCES",
    "best_isa",
    "find_compiler",
    "load_library",
    "num_threads",
    "product_seconds",
    "supported_isas",
    "take_threads",
]

_FOLDER = Path(__file__).parent
SOURCES = tuple(
    _FOLDER / f"{name}.cpp"
    for name in ("attention", "linear", "largest", "mask", "quantized", "pack", "bridge", "pool")
)
_HEADERS = tuple(
    _FOLDER / f"{name}.h" for name in ("vectors", "panels", "quantized", "operators", "pool")
)
# GCC moves loads ahead before it chooses registers, and then lacks some for a tile's sums.
_ARM = ("-fno-schedule-insns",)
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")

# name -> (features the CPU must have, compiler flags); best first.
ISA_LEVELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512bf16": (
        (*_AVX512, "avx512bf16"),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx512bf16"),
    ),
    "avx512": (_AVX512, ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")),
    "avx2": (("avx2", "fma"), ("-mavx2", "-mfma")),
    "neonbf16": (("neon", "armbf16"), ("-march=armv8.2-a+bf16", *_ARM)),
    "neon": (("neon",), _ARM),  # every 64-bit ARM has it
    "portable": ((), ()),
}
# Products below which one thread does a call alone: sharing it costs a microsecond or two.
MIN_PARALLEL_WORK = 1 << 18

BASE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")


_taken: int | None = None
_loaded: list[ctypes.CDLL] = []


def take_threads() -> None:
    """From now on torch runs on one thread and our kernels on as many as torch had.

    Where linears and attention are ours, what is left for torch is small. Its threads would wait
    for more of it in a loop, on the cores that ours need.
    """
    global _taken
    import torch

    if _taken is None or torch.get_num_threads() > 1:
        _taken = torch.get_num_threads()
        torch.set_num_threads(1)


def num_threads() -> int:
    """How many threads a call may use: torch's setting, or what was taken from it."""
    import torch

    current: int = torch.get_num_threads()
    return current if _taken is None or current > 1 else _taken


def supported_isas(features: tuple[str, ...]) -> tuple[str, ...]:
    """Levels that a CPU with these features can run, best first."""
    return tuple(name for name, (need, _) in ISA_LEVELS.items() if set(need) <= set(features))


def best_isa(features: tuple[str, ...]) -> str:
    """The best level, or what HALYARD_NATIVE_ISA asks for."""
    return os.environ.get("HALYARD_NATIVE_ISA") or supported_isas(features)[0]


def find_compiler() -> str | None:
    """$CXX, or the first C++ compiler on the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    return None


def _cache_dir() -> Path:
    root = os.environ.get("HALYARD_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "halyard") / "native"


@cache
def load_library(isa: str) -> ctypes.CDLL:
    """The library for an ISA level, built if need be. Loading it releases the GIL in calls.

    Raises:
        BackendUnavailableError: there is no compiler, or it fails.
    """
    import torch

    if isa not in ISA_LEVELS:
        raise BackendUnavailableError(
            f"no ISA level {isa!r} (HALYARD_NATIVE_ISA): known are {', '.join(ISA_LEVELS)}"
        )
    compiler = find_compiler()
    if compiler is None:
        raise BackendUnavailableError("the native kernels need a C++ compiler: apt install g++")
    flags = [*BASE_FLAGS, *ISA_LEVELS[isa][1]]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    sources = [path.read_bytes() for path in (*SOURCES, *_HEADERS)]
    content = [*sources, " ".join(flags).encode(), version.stdout.encode()]
    digest = hashlib.sha256(b"\0".join([*content, torch.__version__.encode()])).hexdigest()[:16]
    path = _cache_dir() / f"kernels-{isa}-{digest}.so"
    if not path.exists():
        _build(compiler, flags, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # cut short or of another machine: build it anew
        path.unlink()
        _build(compiler, flags, path)
        library = ctypes.CDLL(str(path))
    for name in ("args_size", "linear_args_size", "pack_args_size"):
        getattr(library, f"halyard_{name}").restype = ctypes.c_int
    library.halyard_product_nanoseconds.restype = ctypes.c_int64
    for name in ("attend_float32", "attend_bfloat16", "linear_float32", "linear_bfloat16",
                 "quantized_float32", "quantized_bfloat16",
                 "quantized_rows_float32", "quantized_rows_bfloat16", "pack_float32",
                 "pack_bfloat16", "quantize_float32", "quantize_bfloat16",
                 "bar_float32", "largest_float32", "largest_bfloat16", "move_blocks", "bind_torch", "set_threads"):  # fmt: skip
        getattr(library, f"halyard_{name}").restype = None
    _loaded.append(library)
    return library


def product_seconds() -> float:
    """What this process spent in linears so far, generated code's calls included."""
    return 1e-9 * sum(int(library.halyard_product_nanoseconds()) for library in _loaded)


def _build(compiler: str, flags: list[str], path: Path) -> None:
    """Every file by itself, several at once: in a row they take 16 s of a first start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix="build-")
    except OSError as error:
        raise BackendUnavailableError(
            f"can't write the native kernels to {path.parent} ({error.strerror}): "
            "set HALYARD_CACHE_DIR to a folder that can be written"
        ) from error
    with scratch as folder, ThreadPoolExecutor(num_cpus()) as pool:
        objects = [str(Path(folder, f"{source.stem}.o")) for source in SOURCES]
        commands = [
            [compiler, *flags, "-w", "-c", str(source), "-o", target]
            for source, target in zip(SOURCES, objects, strict=True)
        ]
        for _ in pool.map(_compile, commands):
            pass
        library = str(Path(folder, path.name))
        _compile([compiler, *flags, "-shared", "-pthread", *objects, "-o", library])
        os.replace(library, path)


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().split("\n")[0]
        raise BackendUnavailableError(f"{command[0]} can't build the native kernels: {last}")
