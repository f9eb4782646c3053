"""Lines of requests become lines of answers; a run that was killed goes on where it was."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from halyard.api.deps import new_id
from halyard.api.dispatch import ENDPOINTS, answer
from halyard.api.host import EngineHost
from halyard.hal.errors import ConfigError

__all__ = ["BatchLine", "read_done", "read_lines", "run_lines"]

AT_ONCE = 128  # lines that are submitted; the scheduler decides how many run
_PAUSE = 0.5  # seconds between two tries of a line
_DEATHS = 3  # of engines that had the line: it may be what they die of
_PASSING = (
    "ready",
    "loading",
    "restarting",
    "asleep",
    "stopping",
)  # an engine answers again, later


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_lines(path: Path, endpoint: str | None = None) -> list[BatchLine]:
    """All requests of a file.

    Args:
        endpoint: the only url that is allowed; None: any that batches serve.

    Raises:
        ConfigError: the file can't be read, or a line is malformed; the text says which.
    """
    found: list[BatchLine] = []
    seen: set[str] = set()
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    line = _line(text, f"{path.name}, line {number}", endpoint)
                    if line.custom_id in seen:
                        raise ConfigError(
                            f"{path.name}, line {number}: custom_id {line.custom_id!r} comes twice"
                        )
                    seen.add(line.custom_id)
                    found.append(line)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from None
    if not found:
        raise ConfigError(f"{path} has no requests")
    return found


def read_done(path: Path) -> dict[str, bool]:
    """custom_ids that an output file has answers for, and whether they are successes.

    A line that was cut off is removed.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.is_file():
        return {}
    found: dict[str, bool] = {}
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # killed while it was written
            try:
                told = json.loads(line)
                found[told["custom_id"]] = told["response"]["status_code"] == 200
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{path}, line {number} is no answer of a batch: give another output file"
                ) from None
            end += len(line)
    with path.open("r+b") as file:
        file.truncate(end)
    return found


async def run_lines(
    host: EngineHost,
    lines: Iterable[BatchLine],
    output: TextIO,
    on_done: Callable[[bool], None] = lambda ok: None,
) -> None:
    """Answer lines, many at once; each answer is written, whole, when it is there.

    Args:
        on_done: is told after each line whether it succeeded.
    """
    left = iter(lines)

    async def work() -> None:
        for line in left:
            status, body = await _answer(host, line)
            told = {
                "id": new_id("batch_req").replace("-", "_"),
                "custom_id": line.custom_id,
                "response": {"status_code": status, "request_id": new_id("req"), "body": body},
                "error": None,
            }
            output.write(json.dumps(told, ensure_ascii=False) + "\n")
            output.flush()
            on_done(status == 200)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())


async def _answer(host: EngineHost, line: BatchLine) -> tuple[int, dict[str, Any]]:
    """A batch has time: what would be told to come again does."""
    deaths = 0
    while True:
        async with host.gate.passage():
            status, body = await answer(host, line.url, line.body)
        code = body["error"]["code"] if status != 200 else None
        if code == "engine_dead":
            deaths += 1
        again = (
            status == 429  # the queue is full of others' requests
            or (code == "not_ready" and not host.given_up)
            or (code == "engine_dead" and deaths < _DEATHS and host.readiness().state in _PASSING)
        )
        if not again:
            return status, body
        await asyncio.sleep(_PAUSE)


def _line(text: str, where: str, endpoint: str | None) -> BatchLine:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ConfigError(f"{where} needs a custom_id")
    if value.get("method", "POST") != "POST":
        raise ConfigError(f"{where}: method must be POST")
    if url not in ENDPOINTS or endpoint not in (None, url):
        fine = endpoint or ", ".join(ENDPOINTS)
        raise ConfigError(f"{where}: url must be {fine}, got {url!r}")
    if not isinstance(body, dict):
        raise ConfigError(f"{where} needs a body")
    return BatchLine(custom_id, url, body)
