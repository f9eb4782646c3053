"""Facts about a loaded engine that decide its answers, and their fingerprint."""

import platform
from dataclasses import dataclass
from typing import Any

from halyard import __version__
from halyard.models.provenance import file_digests, fingerprint, versions
from halyard.runtime.build import BuiltEngine
from halyard.runtime.config import EngineConfig

__all__ = ["Provenance", "provenance_of"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What makes the answers of one server."""

    fingerprint: str
    facts: dict[str, Any]


def provenance_of(built: BuiltEngine, config: EngineConfig) -> Provenance:
    """Read the checkpoint's files and gather the rest. Up to some seconds for large files.

    Raises:
        OSError: a file of the checkpoint can't be read.
    """
    plan, source = built.plan, built.plan.source
    row, device = plan.selection.row, plan.selection.device
    facts: dict[str, Any] = {
        "model": {
            "id": plan.spec.name,
            "architecture": plan.spec.architecture,
            "revision": source.revision if source is not None else None,
            "config_digest": plan.spec.digest(),
            "files": file_digests(source) if source is not None else {},
            "weights": "random" if config.load_format == "dummy" else "checkpoint",
            "random_seed": config.seed if config.load_format == "dummy" else None,
        },
        "backend": {
            "name": row.name,
            "device": row.device,
            "kernels": row.kernels,
            "graph": row.graph,
            "hardware": device.name,
            "arch": device.arch,
        },
        "plan": {
            "dtype": plan.dtype,
            "quantization": None,
            "block_size": config.block_size,
            "max_model_len": plan.memory.max_model_len,
            "max_batched_tokens": plan.max_batched_tokens,
        },
        "versions": {"halyard": __version__, "python": platform.python_version(), **versions()},
    }
    return Provenance(fingerprint(facts), facts)
