"""What made an answer: digests of a checkpoint's files, and a fingerprint of all that matters. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halyard.models.manifest import read_manifest
from halyard.models.source import ModelSource

__all__ = ["file_digests", "fingerprint", "versions"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHOLE = 256 << 20  # bytes: larger files are sampled
_SAMPLES, _SAMPLE = 64, 1 << 20
_SUFFIXES = (".safetensors", ".json", ".model", ".jinja", ".txt")
_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "onnxruntime",
    "apache-tvm",
    "llguidance",
)


def file_digests(source: ModelSource) -> dict[str, str]:
    """Name -> "sha256:..." of the files of a checkpoint that shape its answers.

    A file of the hub's cache has its digest for a name already. Of other files above 256 MiB, 64 MiB
    spread evenly and the size are digested: "sampled-sha256:...".

    What a manifest says of verified files is taken as it is.

    Raises:
        OSError: a file can't be read.
    """
    found = read_manifest(source.path)
    if found is not None:  # the engine was not built unless every file fits it
        return {name: f"sha256:{entry.sha256}" for name, entry in sorted(found[0].files.items())}
    return {
        path.name: _digest(path)
        for path in sorted(source.path.iterdir())
        if path.is_file() and path.suffix in _SUFFIXES
    }


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A short name for facts: equal facts have equal names."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def versions() -> dict[str, str]:
    """Versions of the libraries that can change an answer, as far as they are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _digest(path: Path) -> str:
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return f"sha256:{target.name}"
    size = target.stat().st_size
    hasher = hashlib.sha256()
    with target.open("rb") as file:
        if size <= _WHOLE:
            for chunk in iter(lambda: file.read(_SAMPLE), b""):
                hasher.update(chunk)
            return f"sha256:{hasher.hexdigest()}"
        hasher.update(str(size).encode())
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
            hasher.update(file.read(_SAMPLE))
    return f"sampled-sha256:{hasher.hexdigest()}"
