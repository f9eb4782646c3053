"""A real uvicorn on a real port, in a thread, over an engine that says what it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from scripted_engine import ScriptedEngine, scripted_client
from served import Served

from halyard.api.app import create_app
from halyard.api.connections import LimitedProtocol
from halyard.api.host import EngineHost, Loaded
from halyard.api.server import bind
from halyard.runtime import client as clients


@pytest.fixture
def serve_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    """Starts servers; all end with the test. Each step of an engine is an event, also to late readers."""
    monkeypatch.setattr(clients, "MAX_MERGED", 1)
    stops: list[Callable[[], None]] = []

    def start(
        engine: ScriptedEngine, *, tokenizer: Any = None, wait: bool = True, **app: Any
    ) -> Served:
        host = EngineHost(
            app.pop("loader", None)
            or (lambda tell: Loaded(scripted_client(engine, tokenizer), "thin air", "float32")),
            app.pop("names", ()),
            restarts=app.pop("restarts", None),
        )
        protocol = app.pop("protocol", LimitedProtocol)
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        made = create_app(host, **app)
        server = uvicorn.Server(
            uvicorn.Config(
                made,
                http=protocol,
                ws="none",
                loop="asyncio",
                log_config=None,
                lifespan="on",
                timeout_graceful_shutdown=1,
                timeout_keep_alive=30,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
        served = Served(engine, port, host, http, app=made)

        def stop() -> None:
            http.close()
            server.should_exit = True
            thread.join(10)

        served.stop = stop
        stops.append(stop)
        assert served.until(lambda: server.started)
        if wait:
            assert served.until(lambda: http.get("/ready").status_code == 200)
        return served

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def served(serve_engine: Callable[..., Served]) -> Served:
    return serve_engine(ScriptedEngine())
