"""Facts about a loaded engine that decide its answers, and their fingerprint."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halyard import __version__
from halyard.models.provenance import fingerprint, versions
from halyard.runtime.port import EngineFacts

__all__ = ["Provenance", "provenance_of"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What makes the answers of one server."""

    fingerprint: str
    facts: dict[str, Any]


def provenance_of(facts: EngineFacts, files: Mapping[str, str]) -> Provenance:
    """Put together what an engine tells, and the digests of its checkpoint's files by name."""
    told = facts.provenance
    whole: dict[str, Any] = {
        **told,
        "model": {**told["model"], "files": dict(files)},
        "versions": {"halyard": __version__, "python": platform.python_version(), **versions()},
    }
    return Provenance(fingerprint(whole), whole)
