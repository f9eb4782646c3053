"""The backend that is being proven: its parts, what they claim, and whether they can run here."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halyard.hal.matrix import BackendRow, load_matrix
from halyard.hal.registry import load_part, probe_device, probe_part
from halyard.hal.selection import probe_backend
from halyard.hal.types import Capabilities, DeviceInfo, DType

__all__ = ["BackendUnderTest", "find_backend"]


@dataclass(frozen=True, slots=True)
class BackendUnderTest:
    """A row of the matrix (or a triple) with what its parts say about themselves."""

    row: BackendRow
    matrix: Path | None  # another hw_matrix.yaml, as it was asked for
    reasons: tuple[str, ...]  # why it can't run here; empty: it can
    info: DeviceInfo | None
    capabilities: Capabilities | None

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def computes(self) -> bool:
        """False for the null backend: it has nothing to be right about."""
        return self.row.kernels != "null"

    def claimed_dtypes(self) -> tuple[DType, ...]:
        """Dtypes that the row names and the kernels claim."""
        if self.capabilities is None:
            return ()
        return tuple(d for d in self.row.dtypes if d in self.capabilities.dtypes)

    def offers(self, claim: str) -> bool:
        """Whether the kernels claim something that the contract leaves to them."""
        return self.capabilities is not None and bool(
            getattr(load_part("kernels", self.row.kernels), claim, False)
        )

    def versions(self) -> dict[str, str]:
        """Library versions as the probes of the parts tell them."""
        found = dict(probe_device(self.row.device).versions)
        if self.info is not None:
            found |= probe_part("kernels", self.row.kernels, self.info).versions
            found |= probe_part("graphs", self.row.graph, self.info).versions
        return found

    def digest(self) -> str:
        """SHA-256 over the sources of the three parts (each one's folder or file)."""
        digest = hashlib.sha256()
        for axis, name in (("devices", self.row.device), ("kernels", self.row.kernels),
                           ("graphs", self.row.graph)):  # fmt: skip
            part = load_part(axis, name)
            for file in _sources(part):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()


def _sources(part: Any) -> list[Path]:
    """The files a part consists of: its module's folder if that is a package of its own."""
    file = Path(inspect.getfile(part)).resolve()
    package = importlib.import_module(part.__module__.rpartition(".")[0])
    shared = {"halyard.hal.devices", "halyard.hal.kernels", "halyard.compiler.graphs"}
    if package.__name__ in shared:
        return [file]
    kinds = {".py", ".cpp", ".h", ".cu"}
    return sorted(p for p in file.parent.rglob("*") if p.suffix in kinds)


def find_backend(name: str, matrix: Path | None = None) -> BackendUnderTest:
    """A backend by its row's name, or as "device:kernels:graph".

    Raises:
        ConfigError: there is no such backend or part.
    """
    row = load_matrix(matrix).row(name)
    report = probe_backend(row)
    reasons = list(report.reasons)
    capabilities = None
    try:
        capabilities = load_part("kernels", row.kernels).capabilities
    except ImportError as error:
        if not reasons:
            reasons.append(f"kernels {row.kernels!r}: {error}")
    return BackendUnderTest(row, matrix, tuple(reasons), report.device, capabilities)
