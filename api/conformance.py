"""L6 of the conformance suite: the server, as a process on a real port, over the backend.

Speaks plain HTTP with the standard library, so that it runs wherever the package does.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.models.source import resolve_source
from halyard.models.spec import ModelSpec

__all__ = ["cases"]

_START_SECONDS = 400.0
PROMPT = "def add(a, b):\n    "


def cases(backend: BackendUnderTest) -> list[Case]:
    """One case a dtype, over the embedded model: starting a server is what takes long."""
    if not backend.computes:
        return []
    need_of = ModelSpec.load(resolve_source("embedded")).requirements
    return [
        Case("L6", "server", _server, dtype, need_of(dtype, 16), seconds=600.0,
             waived=() if dtype in backend.claimed_dtypes() else (f"dtype {dtype}",))
        for dtype in ("float32", "bfloat16", "float16")
    ]  # fmt: skip


class _Client:
    """Requests to one server."""

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        try:
            text = json.dumps(body) if body is not None else None
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        status, text = self.call(method, path, body)
        if status != 200:
            raise RuntimeError(f"{method} {path} answered {status}: {text[:300]!r}")
        return json.loads(text)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        _, text = self.call("GET", "/metrics")
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text.decode(), re.MULTILINE)
        if not found:
            raise RuntimeError(f"/metrics has no {name}")
        return sum(map(float, found))


@contextmanager
def _serving(context: CaseContext) -> Iterator[_Client]:
    backend = context.backend
    command = [
        sys.executable, "-m", "halyard.api.cli.main", "serve", "embedded", "--port", "0",
        "--backend", backend.name, "--dtype", context.dtype, "--kv-blocks", "128",
        "--max-num-sequences", "16",
    ]  # fmt: skip
    if backend.matrix is not None:
        command += ["--matrix", str(backend.matrix)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            client = _wait(process, said)
            yield client
            process.send_signal(signal.SIGINT)
            status = process.wait(60)
            context.require(status in (0, 130), f"the server ended with exit status {status}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], said: Any) -> _Client:
    """A client, once the server is ready."""
    deadline = time.monotonic() + _START_SECONDS
    client = None
    while time.monotonic() < deadline:
        said.seek(0)
        text = said.read()
        if process.poll() is not None:
            raise RuntimeError(f"the server ended at once: {text[-500:]}")
        address = re.search(r"http://([^\s:/]+):(\d+)", text)
        if client is None and address:
            client = _Client(address[1], int(address[2]))
        if client is not None:
            try:
                if client.call("GET", "/ready")[0] == 200:
                    return client
            except OSError:
                pass  # not listening yet
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready in {_START_SECONDS:.0f} s: {text[-500:]}")


def _server(context: CaseContext) -> None:
    require = context.require
    with _serving(context) as client:
        require(client.call("GET", "/health")[0] == 200, "/health is not well")
        models = client.json("GET", "/v1/models")["data"]
        require(len(models) >= 1, "/v1/models is empty")
        ask = {"model": models[0]["id"], "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        whole = client.json("POST", "/v1/completions", ask)
        text = whole["choices"][0]["text"]
        require(bool(text.strip()), "an empty completion")
        require(whole["usage"]["completion_tokens"] == 12, f"usage says {whole['usage']}")
        again = client.json("POST", "/v1/completions", ask)["choices"][0]["text"]
        require(again == text, "the same greedy request gave another text")
        require(_streamed(client, ask) == text, "the stream and the whole answer differ")
        chat = client.json("POST", "/v1/chat/completions", {
            "model": ask["model"], "max_tokens": 8, "temperature": 0,
            "messages": [{"role": "user", "content": "Write a function."}]})  # fmt: skip
        require(
            chat["choices"][0]["message"]["role"] == "assistant", "chat answers as someone else"
        )
        status, body = client.call("POST", "/v1/completions", ask | {"max_tokens": -1})
        require(status == 400, f"a bad request was answered with {status}")
        require("error" in json.loads(body), "a bad request got no error envelope")
        _disconnect(client, ask | {"max_tokens": 1000, "stream": True, "ignore_eos": True})
        # Numbers are a little late: the request may not be in them yet, so one look is no proof.
        deadline, idle = time.monotonic() + 20, 0
        while idle < 5 and time.monotonic() < deadline:
            idle = 0 if client.metric("halyard_requests_running") else idle + 1
            time.sleep(0.1)
        require(idle == 5, "a client went away and its request still runs")
        used = client.metric("halyard_kv_blocks_used")
        require(used == 0, f"{used:.0f} blocks are still in use")


def _streamed(client: _Client, ask: dict[str, Any]) -> str:
    status, body = client.call("POST", "/v1/completions", ask | {"stream": True})
    if status != 200:
        raise RuntimeError(f"streaming answered {status}")
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    if lines[-1] != "[DONE]":
        raise RuntimeError("the stream does not end with [DONE]")
    return "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])


def _disconnect(client: _Client, ask: dict[str, Any]) -> None:
    """Begin a long stream and go away after its first bytes."""
    body = json.dumps(ask).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {client.address[0]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(client.address, timeout=60) as connection:
        connection.sendall(head.encode() + body)
        connection.recv(1024)
