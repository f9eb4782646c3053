"""Specs that were read before: transformers, which reads configs, takes a second or two to import.

An entry is used only for the very same files, the same transformers and the same code.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halyard.hal import fallbacks

__all__ = ["SpecCache"]

_CONFIGS = ("config.json", "generation_config.json")


class SpecCache:
    """What was derived from a checkpoint's configs, as JSON, one file a checkpoint.

    Args:
        directory: is made when something is kept; one that can't be written keeps nothing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def key(self, folder: Path) -> str | None:
        """A digest of all that decides a spec; None if there is no config to read."""
        digest = hashlib.sha256(Path(__file__).with_name("spec.py").read_bytes())
        try:
            digest.update(version("transformers").encode())
        except PackageNotFoundError:
            return None
        for name in _CONFIGS:
            file = folder / name
            content = file.read_bytes() if file.is_file() else None
            if content is None and name == "config.json":
                return None
            digest.update(f"\0{name}\0{'none' if content is None else len(content)}\0".encode())
            digest.update(content or b"")
        return digest.hexdigest()[:32]

    def find(self, key: str) -> dict[str, Any] | None:
        """What was kept, or None."""
        try:
            kept = json.loads((self.directory / f"{key}.json").read_text())
        except (OSError, ValueError):  # not there, or cut short: it is derived anew
            return None
        return kept if isinstance(kept, dict) else None

    def keep(self, key: str, facts: Mapping[str, Any]) -> None:
        """Write an entry; where the disk refuses, say so and go on: the next start derives it again."""
        scratch: str | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(suffix=".new", dir=self.directory)
            with os.fdopen(handle, "w") as file:
                json.dump(facts, file)
            os.replace(scratch, self.directory / f"{key}.json")
        except OSError as error:
            if scratch is not None:
                Path(scratch).unlink(missing_ok=True)
            fallbacks.note("spec_cache", f"can't write to the cache {self.directory}: {error}")
