"""Log lines: text for people or JSON for collectors, each with the request it belongs to.

No prompt and no answer is logged, in either form.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, get_args

from halyard.api.context import current
from halyard.hal.errors import ConfigError

__all__ = ["JsonFormatter", "LogFormat", "access_line", "configure"]

LogFormat = Literal["text", "json"]

access = logging.getLogger("halyard.access")
_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85, 0x2028, 0x2029)}
_TEXT = "%(asctime)s %(name)s %(levelname)s %(message)s"


class _WithRequest(logging.Filter):
    """Notes on each record which request it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = current.get()
        if context is not None and not hasattr(record, "request"):
            record.request = context
        return True


class TextFormatter(logging.Formatter):
    """One line a record; its request's id comes last."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        # A path or a message may hold what a caller sent: it makes no line of its own.
        line = super().formatMessage(record).translate(_ESCAPED)
        context = getattr(record, "request", None)
        return f"{line} [{context.request_id}]" if context is not None else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what is known of the request."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = getattr(record, "request", None)
        if context is not None:
            for name in ("request_id", "tenant", "trace_id"):
                if value := getattr(context, name):
                    line[name] = value
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(
    form: str = "text", level: int = logging.WARNING, *, access_log: bool = False,
    stream: TextIO | None = None,
) -> None:  # fmt: skip
    """Send this process's log lines to a stream, standard error by default.

    Raises:
        ConfigError: no such format.
    """
    if form not in get_args(LogFormat):
        raise ConfigError(f"log format must be text or json, got {form!r}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_WithRequest())
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    access.setLevel(logging.INFO if access_log else logging.WARNING)


def access_line(method: str, path: str, status: int, seconds: float, client: Sequence[Any]) -> None:
    """One line a request, if they are asked for. Query strings may hold secrets: left out."""
    fields = {
        "method": method,
        "path": path,
        "status": status,
        "seconds": round(seconds, 6),
        "client": client[0] if client else "",
    }
    access.info("%s %s %d in %.3f s", method, path, status, seconds, extra={"fields": fields})
