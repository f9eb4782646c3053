"""What a test of the API is given: a server that runs, and a client for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from scripted_engine import ScriptedEngine

from halyard.api.host import EngineHost

__all__ = ["Served"]


@dataclass
class Served:
    """A server under test."""

    engine: ScriptedEngine
    port: int
    host: EngineHost
    http: httpx.Client
    stop: Callable[[], None] = lambda: None
    app: Any = None  # as uvicorn runs it

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.01)
        return condition()
