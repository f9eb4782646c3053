"""TorchInductor. On the CPU every unique segment becomes one shared library for any batch size,
ahead of time; for GPUs see inductor_gpu.py.

Ahead of time rather than just in time because a call then costs no Python, there are no guards and
so no recompiles (one token, as many rows as tokens: the same code), and what is kept on disk is
loaded in a millisecond. The libraries name libgomp by its soname, so that they share the one
OpenMP runtime that torch has loaded, and with it its threads.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, fx

from halyard.compiler.graphs.inductor_gpu import Artefact, compile_artefact, load_artefact
from halyard.hal import fallbacks
from halyard.hal.contract import CONTRACT_VERSION, Executable
from halyard.hal.errors import BackendUnavailableError
from halyard.hal.types import DeviceInfo, Probe

__all__ = ["InductorCompiler"]

logger = logging.getLogger("halyard.inductor")

_GPUS = ("cuda", "rocm")
_TIMEOUT = 600  # seconds a segment
_LIBRARY = "segment.so"
_EXTERN = "segment.json"  # which custom operators the library calls; absent if none
_INSTALL = "apt-get install g++, or dnf install gcc-c++, or set CXX to a C++ compiler"


class _Library:
    """A compiled segment: positional tensors in, a tuple of tensors out."""

    def __init__(self, directory: Path, owner: tempfile.TemporaryDirectory[str] | None) -> None:
        self.directory = directory
        self._owner = owner  # the folder lives as long as this does
        self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(directory / _LIBRARY), 1)
        self._run = self._first_run

    def _first_run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Weights are prepared by now, with all of torch's threads: steps begin."""
        from halyard.hal.kernels.native.bridge import take_torch_threads

        take_torch_threads()
        self._run = self._runner.run
        return self._run(inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(list(inputs)))


class InductorCompiler:
    """Compiles with Inductor's C++ backend; needs a C++ compiler where it compiles."""

    contract_version = CONTRACT_VERSION
    name = "inductor"

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        reasons = []
        if device.kind in _GPUS:
            if find_spec("triton") is None:
                reasons.append("inductor needs triton on a GPU: pip install triton")
        elif device.kind != "cpu":
            reasons.append(f"inductor compiles for cpu, cuda and rocm, not for {device.kind}")
        elif _compiler() is None:
            reasons.append(f"no C++ compiler ({_INSTALL})")
        return Probe(not reasons, tuple(reasons), versions={"torch": torch.__version__})

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        passes = ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input")
        more = {
            "cpu": ("prepack_linears", "gate_linears"),
            "cuda": ("skinny_linears", "add_in_linears", "gate_linears", "rotate_heads",
                     "largest_of_few", "experts_apart"),
        }  # fmt: skip
        return (*passes, *more.get(device.kind, ()))

    def fingerprint(self) -> str:
        """What, beside torch and the device, decides the code that comes out."""
        compiler = _compiler()
        if compiler is None:
            return "none"
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
        return done.stdout.split("\n")[0]

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        if device.kind in _GPUS:
            return compile_artefact(segment, inputs)
        owner = tempfile.TemporaryDirectory(prefix="halyard-segment-")
        _compile_into(segment, inputs, Path(owner.name))
        _offer_operators()
        return _Library(Path(owner.name), owner)

    def compile_all(
        self,
        segments: Sequence[tuple[fx.GraphModule, Sequence[Tensor]]],
        device: DeviceInfo,
        done: Callable[[], object],
    ) -> list[Executable]:
        """Compile several at once, one process a core; `done` is called after each.

        Nine tenths of the time goes to the C++ compiler and to Python that holds one lock, so this
        divides a first start by the number of cores. The processes are gone when it returns.
        """
        if device.kind in _GPUS:
            made: list[Executable] = []
            for module, inputs in segments:
                made.append(compile_artefact(module, inputs))
                done()
            return made
        owners = [tempfile.TemporaryDirectory(prefix="halyard-segment-") for _ in segments]
        jobs = [
            (module, inputs, Path(owner.name))
            for (module, inputs), owner in zip(segments, owners, strict=True)
        ]
        compiled = _compile_in_processes(jobs, device.num_cores, done)
        for (module, inputs, directory), is_done in zip(jobs, compiled, strict=True):
            if not is_done:  # here an error shows itself whole
                _compile_into(module, inputs, directory)
                done()
        _offer_operators()
        return [_Library(Path(owner.name), owner) for owner in owners]

    def save(self, executable: Executable, directory: Path) -> bool:
        if isinstance(executable, Artefact):
            return executable.save(directory)
        if not isinstance(executable, _Library):
            return False
        directory.mkdir(parents=True, exist_ok=True)
        for name in (_LIBRARY, _EXTERN):
            if (executable.directory / name).is_file():
                shutil.copyfile(executable.directory / name, directory / name)
        return True

    def load(self, directory: Path, device: DeviceInfo) -> Executable:
        if device.kind in _GPUS:
            return load_artefact(directory)
        _offer_operators()
        return _Library(directory, None)


def _offer_operators() -> None:
    """Make our operators callable by the libraries that are loaded next."""
    from halyard.hal.kernels.native.bridge import offer_operators

    offer_operators()


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


_Job = tuple[fx.GraphModule, Sequence[Tensor], Path]


def _compile_in_processes(
    jobs: Sequence[_Job], num_processes: int, done: Callable[[], object]
) -> list[bool]:
    """Fork for each job; which of them succeeded. All False where forking is no good idea."""
    compiled = [False] * len(jobs)
    if len(jobs) < 2 or num_processes < 2 or not _may_fork():
        return compiled
    import torch._inductor.compile_fx  # noqa: F401 - once, not in each process

    running: dict[int, tuple[int, float]] = {}  # process id -> job, deadline
    waiting = list(range(len(jobs)))
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                job = waiting.pop(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # see _may_fork
                    process = os.fork()
                if process == 0:
                    _compile_and_exit(jobs[job])
                running[process] = (job, time.monotonic() + _TIMEOUT)
            time.sleep(0.02)
            for process, (job, deadline) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    del running[process]
                    compiled[job] = status == 0
                    if status == 0:
                        done()
                elif time.monotonic() > deadline:
                    fallbacks.note(
                        "parallel_compile",
                        f"a segment took over {_TIMEOUT} s to compile: the rest one after another",
                    )
                    break  # those that run are ended below, and their jobs done here
            else:
                continue
            break
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return compiled


def _may_fork() -> bool:
    """Only while no other thread of ours could hold a lock that the copy would wait for.

    The main thread may be another one, a server's event loop: it runs no torch, and the interpreter
    puts its own locks right in the copy.
    """
    harmless = {threading.main_thread(), threading.current_thread()}
    others = {t for t in threading.enumerate() if t.name != "tqdm_monitor"} - harmless
    # A context of an accelerator doesn't survive a fork, and Inductor asks for it if there is one.
    return hasattr(os, "fork") and not others and not torch.accelerator.is_available()


def _compile_and_exit(job: _Job) -> NoReturn:
    status = 1
    try:
        torch.set_num_threads(1)  # the OpenMP threads of the parent don't exist here
        _compile_into(*job)
        status = 0
    except BaseException:  # noqa: BLE001 - reported here; the parent compiles it again
        logger.debug("compiling in a process failed: %s", traceback.format_exc())
    finally:
        os._exit(status)


def _compile_into(
    segment: fx.GraphModule,
    inputs: Sequence[Tensor],
    directory: Path,
) -> None:
    """Compile to `directory`/segment.so (and .json). `inputs` are fake, with symbolic sizes."""
    from torch._inductor.compile_fx import compile_fx_aot

    compiler = _compiler()
    if compiler is None:
        raise BackendUnavailableError(f"inductor needs a C++ compiler: {_INSTALL}")
    from halyard.hal.kernels.native.bridge import C_FUNCTIONS

    build = directory / "build"
    options = {
        # Our operators are called as C functions, not through the dispatcher.
        "aot_inductor.custom_ops_to_c_shims": C_FUNCTIONS,
        "aot_inductor.package": False,
        "aot_inductor.output_path": str(build / _LIBRARY),
        # Parsing the headers once for all segments costs more than it saves for three of them.
        "aot_inductor.precompile_headers": _parse_once(),
        "aot_inductor.enable_line_tables": False,
        "cpp_cache_precompile_headers": _parse_once(),
        "compile_threads": 1,  # no pool of subprocesses that outlives us
        # What is left between linears and attention is small: a parallel region around each norm
        # gains little, and on a busy machine costs a time slice at its barrier.
        "cpp.threads": 1,
        "cpp.cxx": (None, compiler),
        # Believe the CPU's own flags: Inductor's check builds a test program for each of them.
        "cpp.vec_isa_ok": True,
    }
    known = {key: value for key, value in options.items() if _known_option(key)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's own
        library = Path(str(compile_fx_aot(segment, list(inputs), config_patches=known)))
    shutil.move(library, directory / _LIBRARY)
    for extern in build.glob("*.json"):
        if not extern.stem.endswith("_metadata"):  # the other files are for people
            shutil.move(extern, directory / _EXTERN)
    shutil.rmtree(build, ignore_errors=True)


def _parse_once() -> bool:
    """Whether headers are parsed once and kept: asked for by Inductor's own switch, where much is compiled."""
    return os.environ.get("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS") == "1"


def _known_option(key: str) -> bool:
    """Whether this torch has the option: they come and go between releases."""
    from torch._inductor import config

    return key in config._config  # type: ignore[attr-defined]
