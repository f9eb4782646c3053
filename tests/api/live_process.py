"""`halyard serve` on the null backend, with a client: an answer counts on from its prompt's last token, so
that each can be checked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from serve_process import ServeProcess

__all__ = ["SMALL", "LiveProcess", "events", "until"]

SMALL = ("--backend", "null", "--kv-blocks", "512", "--host-kv-blocks", "0")


class LiveProcess(ServeProcess):
    """Ready when it is made."""

    def __init__(self, *arguments: str) -> None:
        super().__init__(*arguments, *SMALL)
        self.wait_for("Ready:")
        self.http = httpx.Client(base_url=self.url, timeout=300)

    def ask(self, first: int, count: int = 5, **more: Any) -> httpx.Response:
        body = {"prompt": [first], "max_tokens": count, "return_token_ids": True, "temperature": 0}
        return self.http.post("/v1/completions", json=body | {"ignore_eos": True} | more)

    def ready(self) -> httpx.Response:
        return self.http.get("/ready")

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def admin(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/admin/{path}", json=body)

    def close(self) -> None:
        self.http.close()
        assert self.stop() == 0
        assert "Traceback" not in self.stderr


def until(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.2)


def events(server: LiveProcess, first: int, count: int) -> Iterator[dict[str, Any]]:
    body = {"prompt": [first], "max_tokens": count, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])
