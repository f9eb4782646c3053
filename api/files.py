"""Files that clients upload, in a local folder: one folder a file, its facts beside its bytes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from halyard.api.deps import new_id, now
from halyard.api.errors import NotFoundError
from halyard.api.tenants import caller
from halyard.hal.errors import RequestError

__all__ = ["FileStore"]

_ID = re.compile(r"file-[0-9a-f]{24}")
_PURPOSES = ("batch", "batch_output", "user_data", "assistants", "fine-tune", "evals", "vision")


class FileStore:
    """Small: every call reads or writes a few files. Callers see their tenant's files alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, content: bytes, filename: str, purpose: str) -> dict[str, Any]:
        """Keep a file.

        Raises:
            RequestError: the purpose is unknown.
        """
        if purpose not in _PURPOSES:
            raise RequestError(f"purpose must be one of {', '.join(_PURPOSES)}", "purpose")
        file_id = new_id("file")
        folder = self._folder / file_id
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(content)
        facts = {"id": file_id, "object": "file", "bytes": len(content), "created_at": now(),
                 "filename": filename, "purpose": purpose, "status": "processed"}  # fmt: skip
        kept = facts | {"tenant": caller().tenant.name}
        (folder / "facts.json").write_text(json.dumps(kept))
        return facts

    def facts(self, file_id: str) -> dict[str, Any]:
        """
        Raises:
            NotFoundError: there is no such file.
        """
        found: dict[str, Any] = json.loads((self._find(file_id) / "facts.json").read_text())
        found.pop("tenant", None)
        found["bytes"] = self.path(file_id).stat().st_size
        return found

    def path(self, file_id: str) -> Path:
        """Where its bytes are."""
        return self._find(file_id) / "content"

    def all(self) -> list[dict[str, Any]]:
        """The newest first."""
        if not self._folder.is_dir():
            return []
        found = [self.facts(p.name) for p in self._folder.iterdir() if self._is_own(p)]
        return sorted(found, key=lambda facts: int(facts["created_at"]), reverse=True)

    def delete(self, file_id: str) -> None:
        shutil.rmtree(self._find(file_id))

    def _find(self, file_id: str) -> Path:
        folder = self._folder / file_id
        if not self._is_own(folder):
            raise NotFoundError(f"no file {file_id!r} is stored here", "file_id")
        return folder

    @staticmethod
    def _is_own(folder: Path) -> bool:
        if not _ID.fullmatch(folder.name) or not (folder / "facts.json").is_file():
            return False
        owner = json.loads((folder / "facts.json").read_text()).get("tenant", "default")
        return bool(owner == caller().tenant.name)
