"""Batches that run beside the server's other requests; those that a stop cut off go on at the next start."""

import asyncio
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

from halyard.api.batch_run import read_done, read_lines, run_lines
from halyard.api.deps import new_id, now
from halyard.api.dispatch import ENDPOINTS
from halyard.api.errors import NotFoundError
from halyard.api.files import FileStore
from halyard.api.host import EngineHost
from halyard.api.paging import Listed, Place
from halyard.api.tenancy import Tenancy
from halyard.api.tenants import act_as, caller
from halyard.hal.errors import ConfigError, RequestError

__all__ = ["BatchStore"]

logger = logging.getLogger("halyard.api")

_ID = re.compile(r"batch_[0-9a-f]{24}")
_DAY = 24 * 3600
_OWN = ("tenant", "created_ns")  # what clients don't see
_ENDED = ("completed", "failed", "cancelled", "expired")


class BatchStore:
    """Belongs to the event loop. A batch is a JSON file; its answers go straight to their file.

    Callers see their tenant's batches alone.
    """

    def __init__(self, folder: Path, files: FileStore, host: EngineHost, tenancy: Tenancy) -> None:
        self._folder = folder
        self._files = files
        self._host = host
        self._tenancy = tenancy
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._counts: dict[str, dict[str, int]] = {}  # of running ones

    def start(self) -> None:
        """Go on with what an earlier stop cut off."""
        for batch in self._stored():
            if batch["status"] not in _ENDED:
                self._launch(batch)

    def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    def create(
        self, input_file_id: str, endpoint: str, metadata: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Start one.

        Raises:
            NotFoundError: no such file.
            RequestError: the endpoint takes no batches.
        """
        if endpoint not in ENDPOINTS:
            raise RequestError(f"endpoint must be one of {', '.join(ENDPOINTS)}", "endpoint")
        try:
            self._files.path(input_file_id)
        except NotFoundError as error:
            raise NotFoundError(str(error), "input_file_id") from None
        created = now()
        batch: dict[str, Any] = {
            "id": new_id("batch").replace("-", "_"),
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file_id,
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": created,
            "in_progress_at": None,
            "expires_at": created + _DAY,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            "tenant": caller().tenant.name,
            "created_ns": time.time_ns(),
        }
        self._save(batch)
        self._launch(batch)
        return _shown(batch)

    def get(self, batch_id: str) -> dict[str, Any]:
        """
        Raises:
            NotFoundError: there is no such batch.
        """
        return _shown(self._own(batch_id))

    def listed(self) -> list[Listed]:
        """All of them, in no order."""
        return [Listed(_place(one), _shown(one)) for one in self._stored() if _is_own(one)]

    def place(self, batch_id: str) -> Place:
        """Where a batch is among the others.

        Raises:
            RequestError: there is none.
        """
        try:
            return _place(self._own(batch_id))
        except NotFoundError as error:
            raise RequestError(f"after: {error}", "after") from None

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """End one; answers that are there stay.

        Raises:
            NotFoundError: there is no such batch.
            RequestError: it has ended.
        """
        batch = self._own(batch_id)
        if batch["status"] in _ENDED:
            raise RequestError(f"the batch is {batch['status']} already", "batch_id")
        batch |= {"status": "cancelled", "cancelling_at": now(), "cancelled_at": now()}
        self._save(batch)
        if task := self._tasks.pop(batch_id, None):
            task.cancel()
        return _shown(batch)

    def _own(self, batch_id: str) -> dict[str, Any]:
        path = self._folder / f"{batch_id}.json"
        batch = self._read(path) if _ID.fullmatch(batch_id) and path.is_file() else None
        if batch is None or not _is_own(batch):
            raise NotFoundError(f"no batch {batch_id!r} is stored here", "batch_id")
        return batch

    def _stored(self) -> list[dict[str, Any]]:
        """Everybody's."""
        names = self._folder.glob("batch_*.json") if self._folder.is_dir() else ()
        return [self._read(path) for path in names if _ID.fullmatch(path.stem)]

    def _read(self, path: Path) -> dict[str, Any]:
        batch: dict[str, Any] = json.loads(path.read_text())
        if path.stem in self._counts:
            batch["request_counts"] = self._counts[path.stem]
        return batch

    def _launch(self, batch: dict[str, Any]) -> None:
        task = asyncio.create_task(self._run(batch))
        self._tasks[batch["id"]] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch["id"], None))

    async def _run(self, batch: dict[str, Any]) -> None:
        try:
            who = self._tenancy.caller_named(batch.get("tenant", "default"))
            if who is None:
                raise ConfigError("the tenant of this batch has gone")
            act_as(who)
            while not self._host.readiness().ready:
                await asyncio.sleep(0.2)
            await self._answer(batch)
        except (ConfigError, NotFoundError) as error:
            line = {"code": "invalid_file", "message": str(error), "line": None, "param": None}
            batch["errors"] = {"object": "list", "data": [line]}
            self._save(batch | {"status": "failed", "failed_at": now()})
        except Exception:
            logger.exception("%s failed", batch["id"])
            self._save(batch | {"status": "failed", "failed_at": now()})
        finally:
            self._counts.pop(batch["id"], None)

    async def _answer(self, batch: dict[str, Any]) -> None:
        source = self._files.path(batch["input_file_id"])
        lines = await asyncio.to_thread(read_lines, source, batch["endpoint"])
        if batch["output_file_id"] is None:
            made = self._files.create(b"", f"{batch['id']}_output.jsonl", "batch_output")
            batch |= {"output_file_id": made["id"], "in_progress_at": now()}
        target = self._files.path(batch["output_file_id"])
        done = await asyncio.to_thread(read_done, target)
        completed = sum(done.values())
        counts = {"total": len(lines), "completed": completed, "failed": len(done) - completed}
        self._counts[batch["id"]] = batch["request_counts"] = counts
        batch["status"] = "in_progress"
        self._save(batch)

        def count(ok: bool) -> None:
            counts["completed" if ok else "failed"] += 1

        left = [line for line in lines if line.custom_id not in done]
        with target.open("a", encoding="utf-8") as output:
            await run_lines(self._host, left, output, count)
        self._save(batch | {"status": "completed", "finalizing_at": now(), "completed_at": now()})

    def _save(self, batch: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{batch['id']}.json"
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(batch))
        fresh.replace(path)  # whole, or as it was


def _is_own(batch: dict[str, Any]) -> bool:
    return bool(batch.get("tenant", "default") == caller().tenant.name)


def _place(batch: dict[str, Any]) -> Place:
    return batch.get("created_ns", batch["created_at"] * 10**9), batch["id"]


def _shown(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in _OWN}
