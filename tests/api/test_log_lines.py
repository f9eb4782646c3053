"""What callers send can't make log lines of its own."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from scripted_engine import ScriptedEngine
from served import Served

from halyard.api.logs import JsonFormatter, TextFormatter


@contextmanager
def log_of(formatter: logging.Formatter) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    loggers = [logging.getLogger(name) for name in ("halyard.access", "halyard.api")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield stream
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_path_or_a_body_forges_no_line(
    serve_engine: Callable[..., Served], formatter: logging.Formatter
) -> None:
    served = serve_engine(ScriptedEngine())
    forged = "2026-01-01 00:00:00,000 halyard.api ERROR pwned"
    with log_of(formatter) as log:
        served.http.get("/v1/files/a%0d%0a" + forged.replace(" ", "%20"))
        served.http.get("/v1/models/a%1b%5b31m%0a" + forged.replace(" ", "%20"))
        served.post("/v1/completions", model="x\n" + forged, prompt="a")
        served.post("/v1/completions", model="letters", prompt="a!", user="\n" + forged)
        assert served.until(lambda: log.getvalue().count("\n") >= 4)
    lines = log.getvalue().splitlines()
    assert not [line for line in lines if line.startswith("2026-01-01")]
    assert not any(ord(char) < 32 for line in lines for char in line)
    if isinstance(formatter, JsonFormatter):
        assert all(isinstance(json.loads(line), dict) for line in lines)
