"""An engine that dies again and again is given up in the end; a load that hangs is ended."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from scripted_engine import BlockedLoader, ScriptedEngine
from served import Served

from halyard.api.loading import start_engine
from halyard.api.restarts import RestartConfig
from halyard.hal.errors import EngineDeadError
from halyard.runtime.config import EngineConfig
from halyard.runtime.process_port import launch


def test_an_engine_that_breaks_is_replaced(serve_engine: Callable[..., Served]) -> None:
    loader = BlockedLoader(ScriptedEngine())
    loader.go_on.set()
    served = serve_engine(loader.engine, loader=loader, restarts=RestartConfig())
    assert served.post("/v1/completions", prompt="x?").status_code == 503
    assert served.until(lambda: served.http.get("/ready").status_code == 200)
    assert served.post("/v1/completions", prompt="x").status_code == 200
    assert loader.calls == 2
    assert 'halyard_engine_restarts_total{backend="scripted",model="letters"} 1.0' in (
        served.http.get("/metrics").text
    )


def test_an_engine_that_dies_is_one_line_with_a_count(
    serve_engine: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.02))
    url = f"http://127.0.0.1:{served.port}/v1/completions"
    lasts: list[str] = []

    def stream() -> None:
        body = {"prompt": "a", "max_tokens": 200, "stream": True}
        lasts.append(httpx.post(url, json=body, timeout=30).text.splitlines()[-2])

    threads = [threading.Thread(target=stream) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert served.until(lambda: len(served.engine.running) == 20)
    served.post("/v1/completions", prompt="x?")
    for thread in threads:
        thread.join(20)
    assert len(lasts) == 20
    assert all('"engine_dead"' in last for last in lasts)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert lines == [
        "the engine stopped",  # with its traceback
        "the engine stopped: RuntimeError: secret of the inside; requests that ended with an "
        "error: 21",
    ]


def test_a_crash_loop_ends_with_a_clear_error(serve_engine: Callable[..., Served]) -> None:
    loader = BlockedLoader(ScriptedEngine())
    loader.go_on.set()
    limit = RestartConfig(max_in_a_row=3, max_delay_seconds=0.02)
    served = serve_engine(loader.engine, loader=loader, restarts=limit)
    loader.error = ValueError("no such luck")
    served.post("/v1/completions", prompt="x?")
    assert served.until(lambda: "stays down" in served.http.get("/ready").text)
    told = served.http.get("/ready")
    assert told.status_code == 503
    assert told.json() == {
        "ready": False,
        "reason": "the engine failed 4 times in a row and stays down; last: "
        "loading failed: no such luck",
        "state": "failed",
    }
    assert served.http.get("/health").status_code == 503
    assert served.http.get("/status").json()["state"] == "failed"
    refused = served.post("/v1/completions", prompt="x")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_dead"
    assert "stays down" in refused.json()["error"]["message"]
    assert "retry-after" not in refused.headers  # it won't get better by itself
    assert loader.calls == 4  # one served, three tries
    text = served.http.get("/metrics").text
    assert 'halyard_load_failures_total{backend="scripted",model="letters"} 3.0' in text
    assert 'halyard_ready{backend="scripted",model="letters"} 0.0' in text


def test_engines_that_lived_long_are_no_crash_loop(serve_engine: Callable[..., Served]) -> None:
    loader = BlockedLoader(ScriptedEngine())
    loader.go_on.set()
    limit = RestartConfig(max_in_a_row=1, stable_seconds=0.0)
    served = serve_engine(loader.engine, loader=loader, restarts=limit)
    for _ in range(4):
        served.post("/v1/completions", prompt="x?")
        assert served.until(lambda: served.http.get("/ready").status_code == 200)
    assert loader.calls == 5


def test_a_load_that_hangs_is_ended() -> None:
    config = EngineConfig.create(model="embedded", backend="null", kv_blocks=16, progress=False)
    starting = launch(config)
    os.kill(starting.process.pid, signal.SIGSTOP)
    phases: list[Any] = []
    with pytest.raises(EngineDeadError, match=r"longer than 0\.3 s in the phase 'starting'"):
        start_engine(config, phases.append, load_seconds=0.3, starting=starting)
    assert starting.process.poll() is not None
