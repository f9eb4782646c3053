"""Files that clients upload, in a local folder: one folder a file, its facts beside its bytes."""

import json
import re
import shutil
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, get_args

from halyard.api.deps import new_id, now
from halyard.api.errors import NotFoundError
from halyard.api.paging import Listed, Place
from halyard.api.tenants import caller
from halyard.hal.errors import RequestError

__all__ = ["FileStore", "Purpose"]

Purpose = Literal[
    "batch", "batch_output", "user_data", "assistants", "fine-tune", "evals", "vision"
]

_ID = re.compile(r"file-[0-9a-f]{24}")
_REMEMBERED = 10_000  # places of deleted files


class FileStore:
    """Small: every call reads or writes a few files. Callers see their tenant's files alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A client that deletes what it lists asks for the page after a file that has gone.
        self._gone: OrderedDict[tuple[str, str], Place] = OrderedDict()  # by tenant and id

    def create(self, content: bytes, filename: str, purpose: str) -> dict[str, Any]:
        """Keep a file.

        Raises:
            RequestError: the purpose is unknown.
        """
        known = get_args(Purpose)
        if purpose not in known:
            raise RequestError(f"purpose must be one of {', '.join(known)}", "purpose")
        file_id = new_id("file")
        folder = self._folder / file_id
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(content)
        facts = {"id": file_id, "object": "file", "bytes": len(content), "created_at": now(),
                 "filename": filename, "purpose": purpose, "status": "processed"}  # fmt: skip
        kept = facts | {"tenant": caller().tenant.name, "created_ns": time.time_ns()}
        (folder / "facts.json").write_text(json.dumps(kept))
        return facts

    def facts(self, file_id: str) -> dict[str, Any]:
        """
        Raises:
            NotFoundError: there is no such file.
        """
        return self._shown(self._find(file_id)).facts

    def path(self, file_id: str) -> Path:
        """Where its bytes are."""
        return self._find(file_id) / "content"

    def listed(self, purpose: str | None = None) -> list[Listed]:
        """All of them, or those for one purpose, in no order."""
        if not self._folder.is_dir():
            return []
        found = [self._shown(p) for p in self._folder.iterdir() if self._is_own(p)]
        return [one for one in found if purpose in (None, one.facts["purpose"])]

    def place(self, file_id: str) -> Place:
        """Where a file is, or was, among the others.

        Raises:
            RequestError: there is none, and none that was deleted lately.
        """
        gone = self._gone.get((caller().tenant.name, file_id))
        if gone is not None:
            return gone
        try:
            return self._shown(self._find(file_id)).place
        except NotFoundError as error:
            raise RequestError(f"after: {error}", "after") from None

    def delete(self, file_id: str) -> None:
        folder = self._find(file_id)
        self._gone[caller().tenant.name, file_id] = self._shown(folder).place
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        shutil.rmtree(folder)

    def _find(self, file_id: str) -> Path:
        folder = self._folder / file_id
        if not self._is_own(folder):
            raise NotFoundError(f"no file {file_id!r} is stored here", "file_id")
        return folder

    @staticmethod
    def _shown(folder: Path) -> Listed:
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
        facts.pop("tenant", None)
        place = (facts.pop("created_ns", facts["created_at"] * 10**9), facts["id"])
        facts["bytes"] = (folder / "content").stat().st_size
        return Listed(place, facts)

    @staticmethod
    def _is_own(folder: Path) -> bool:
        if not _ID.fullmatch(folder.name) or not (folder / "facts.json").is_file():
            return False
        owner = json.loads((folder / "facts.json").read_text()).get("tenant", "default")
        return bool(owner == caller().tenant.name)
