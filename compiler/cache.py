"""Compiled programs on disk: a second start compiles nothing and traces nothing.

    DIRECTORY/<key>/manifest.json            sizes and digests of all other files; written last
                    structure.json           calls, recipes, weights wanted
                    constants.safetensors
                    segment-0/ ...           what the graph compiler saved
    DIRECTORY/<key>.lock                     held while a program is being made

An entry is written beside and renamed into place whole, and read only after its digests were
checked, so a process that dies, two that race and a damaged disk all end in compiling anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch

import halyard
from halyard.compiler.program import UnboundProgram
from halyard.compiler.stored import structure_of, with_structure
from halyard.hal import fallbacks
from halyard.hal.contract import GraphCompiler
from halyard.hal.types import DeviceInfo

__all__ = ["ArtefactCache", "default_directory", "load_or_build"]


_FORMAT = "1"
_MAX_BYTES = 1 << 30
_SOURCES = {  # package -> files of it that decide a program
    "halyard.compiler": "**/*.py",
    "halyard.models": "*.py",
    "halyard.hal": "*.py",
}


def default_directory() -> Path:
    """HALYARD_CACHE_DIR, or halyard below the user's cache folder."""
    chosen = os.environ.get("HALYARD_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halyard"


class ArtefactCache:
    """Programs by key. Any number of processes may share the directory."""

    def __init__(self, directory: Path | None = None, max_bytes: int = _MAX_BYTES) -> None:
        self.directory = (directory or default_directory()) / "programs"
        self.max_bytes = max_bytes

    def key(self, facts: Mapping[str, str], compiler: GraphCompiler, device: DeviceInfo) -> str:
        """A digest of everything that decides a program.

        Args:
            facts: what the caller knows: the model's digest, dtype, ...
        """
        from importlib.metadata import version

        fingerprint = getattr(compiler, "fingerprint", None)
        everything = {
            **facts,
            "format": _FORMAT,
            "halyard": halyard.__version__,
            "sources": _source_digest(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": sys.implementation.cache_tag,
            "machine": platform.machine(),
            "device": f"{device.kind} {device.vendor} {device.arch} {' '.join(device.features)}",
            "compiler": compiler.name,
            "compiler_fingerprint": fingerprint() if fingerprint else "",
            "passes": " ".join(compiler.passes(device, facts.get("dtype", ""))),
        }
        text = json.dumps(everything, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold a key: a second process that wants it waits instead of compiling it too."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / f"{key}.lock").open("w")
        except OSError as error:
            fallbacks.note("program_cache", f"can't use the cache {self.directory}: {error}")
            yield
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def load(self, key: str, compiler: GraphCompiler, device: DeviceInfo) -> UnboundProgram | None:
        """The program of `key`, or None. A damaged entry is thrown away."""
        entry = self.directory / key
        if not (entry / "manifest.json").is_file():
            return None
        try:
            _check(entry)
            structure = json.loads((entry / "structure.json").read_text())
            loaded = safetensors.torch.load_file(entry / "constants.safetensors")
            constants = {name: tensor.clone() for name, tensor in loaded.items()}  # aligned
            executables = tuple(
                compiler.load(entry / f"segment-{number}", device)
                for number in range(structure["num_segments"])
            )
            program = with_structure(structure, executables, constants)
        except Exception as error:  # noqa: BLE001 - whatever the damage, compiling anew mends it
            fallbacks.note("program_cache", f"discarding a damaged cache entry {entry}: {error}")
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)  # prune drops what was used longest ago
        return program

    def store(self, key: str, program: UnboundProgram, compiler: GraphCompiler) -> bool:
        """Keep a program; False if its compiler has nothing worth keeping or the disk refuses."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(prefix=f"{key}-", suffix=".new", dir=self.directory))
        except OSError as error:
            fallbacks.note("program_cache", f"can't write to the cache {self.directory}: {error}")
            return False
        try:
            for number, executable in enumerate(program.executables):
                if not compiler.save(executable, fresh / f"segment-{number}"):
                    return False
            (fresh / "structure.json").write_text(json.dumps(structure_of(program)))
            safetensors.torch.save_file(
                {name: tensor.contiguous() for name, tensor in program.constants.items()},
                fresh / "constants.safetensors",
            )
            (fresh / "manifest.json").write_text(json.dumps(_manifest(fresh)))
            fresh.chmod(0o755)
            fresh.rename(self.directory / key)  # fails if another was quicker: its is as good
        except OSError as error:
            if not (self.directory / key / "manifest.json").is_file():
                fallbacks.note(
                    "program_cache", f"can't write to the cache {self.directory}: {error}"
                )
                return False
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        self.prune()
        return True

    def prune(self) -> None:
        """Drop the entries used longest ago until the rest fits in max_bytes."""
        entries = []
        for entry in self.directory.iterdir():
            if not entry.is_dir() or entry.suffix == ".new":
                continue
            with contextlib.suppress(OSError):
                size = sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
                entries.append((entry.stat().st_mtime, size, entry))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries)[:-1]:  # never the newest
            if total <= self.max_bytes:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def load_or_build(
    cache: ArtefactCache | None,
    facts: Mapping[str, str],
    build: Callable[[], UnboundProgram],
    compiler: GraphCompiler,
    device: DeviceInfo,
) -> UnboundProgram:
    """The program from the cache; if it isn't there, `build` makes it and the cache keeps it.

    Args:
        facts: what decides the program beside our code, the compiler and the device.
    """
    if cache is None:
        return build()
    key = cache.key(facts, compiler, device)
    found = cache.load(key, compiler, device)
    if found is not None:
        return found
    with cache.locked(key):
        found = cache.load(key, compiler, device)  # another process may have made it meanwhile
        if found is None:
            found = build()
            cache.store(key, found, compiler)
    return found


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _manifest(entry: Path) -> dict[str, str]:
    return {
        str(file.relative_to(entry)): _digest(file)
        for file in sorted(entry.rglob("*"))
        if file.is_file()
    }


def _check(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    if "structure.json" not in manifest:
        raise ValueError("the manifest lacks its structure")
    for name, digest in manifest.items():
        if _digest(entry / name) != digest:
            raise ValueError(f"{name} is not what was written")


def _source_digest() -> str:
    """A digest of our own code, so that an edited pass is not answered from the cache."""
    digest = hashlib.sha256()
    for package, pattern in _SOURCES.items():
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(folder).glob(pattern)):
                digest.update(str(file.relative_to(folder)).encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()
