"""The embedded model behind a real port, in this process; its chat template can be swapped."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from halyard.api.app import create_app
from halyard.api.host import EngineHost
from halyard.api.loading import load_engine
from halyard.api.server import bind
from halyard.models.tokenizer import Tokenizer
from halyard.runtime.client import Client
from halyard.runtime.config import EngineConfig

__all__ = ["TEMPLATES", "LiveServer", "live_server"]

_TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}<|assistant|>\n"
)
TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }} answer with <tool_call>{% endif %}" + _TURNS,
    "mistral": "{% if tools %}{{ tools | tojson }} [TOOL_CALLS]{% endif %}" + _TURNS,
    "mistral-args": "{% if tools %}{{ tools | tojson }} [TOOL_CALLS]f[ARGS]{% endif %}" + _TURNS,
    "llama": '{% if tools %}{{ tools | tojson }} {"name": "f", "parameters": {}}{% endif %}'
    "{# <|start_header_id|> #}" + _TURNS,
    "thinker": "{# </think> <tool_call> #}{% if tools %}{{ tools | tojson }}{% endif %}" + _TURNS,
}


@dataclass
class LiveServer:
    """A server that answers."""

    url: str
    host: EngineHost
    client: Client
    plain: Tokenizer

    def speak(self, dialect: str) -> None:
        """Use another chat template from now on."""
        tokenizer = copy.copy(self.plain)
        inner = copy.deepcopy(self.plain._inner)
        inner.chat_template = TEMPLATES[dialect]
        tokenizer._inner = inner
        self.client.tokenizer = tokenizer


@contextmanager
def live_server(
    backend: str = "cpu", *, engine: dict[str, Any] | None = None, **app: Any
) -> Iterator[LiveServer]:
    """Serve the embedded model on the default backend, or one that starts sooner."""
    options: dict[str, Any] = {"kv_blocks": 128, "host_kv_blocks": 0, "max_model_len": 1024}
    config = EngineConfig.create(
        model="embedded", backend=backend, progress=False, **(options | (engine or {}))
    )
    host = EngineHost(lambda tell: load_engine(config, tell))
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        # Clients keep a connection for five seconds, uvicorn's own default: a race for the last one.
        uvicorn.Config(
            create_app(host, **app),
            log_config=None,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=30,
        )
    )
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    try:
        deadline = time.monotonic() + 120
        while not host.readiness().ready:
            if time.monotonic() > deadline:
                raise AssertionError(host.readiness().reason)
            time.sleep(0.05)
        client = host.client
        if client.tokenizer is None:
            raise AssertionError("the embedded model has a tokenizer")
        port = listener.getsockname()[1]
        yield LiveServer(f"http://127.0.0.1:{port}", host, client, client.tokenizer)
    finally:
        server.should_exit = True
        thread.join(20)
