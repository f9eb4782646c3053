"""Prompts and answers in files, one a tenant; off unless a folder is given. Nothing else logs them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

__all__ = ["PromptLog"]

logger = logging.getLogger("halyard.api")


class PromptLog:
    """One tenant's file: a JSON object a line. Readable by the server's user alone."""

    def __init__(self, folder: Path, tenant: str) -> None:
        self._path = folder / f"{tenant}.jsonl"

    def write(
        self, request_id: str, answer_id: str, prompts: Sequence[str], answers: Sequence[str]
    ) -> None:
        """Add one request. A full disk costs the log a line, not the client its answer."""
        line = msgspec.json.encode(
            {
                "time": time.time(),
                "request_id": request_id,
                "answer_id": answer_id,
                "prompts": prompts,
                "answers": answers,
            }
        )
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "ab") as file:
                file.write(line + b"\n")
        except OSError as error:
            logger.error("can't write the prompt log %s: %s", self._path.name, error.strerror)
