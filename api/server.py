"""The HTTP server in front of one engine: port, start, welcome, shutdown. No torch: that is the engine's."""

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from halyard.api.connections import ConnectionLimits, protocol_of
from halyard.api.host import EngineHost, Loaded
from halyard.api.keys import KeyRing
from halyard.api.restarts import RestartConfig
from halyard.api.tenancy import Tenancy
from halyard.api.traces import open_traces
from halyard.hal.errors import ConfigError, HalyardError
from halyard.runtime.config import EngineConfig

__all__ = ["ServerConfig", "bind", "serve"]

logger = logging.getLogger("halyard.api")

_FAILED = 2  # exit status of a start that could not work
_INTERRUPTED = 130  # exit status after a second Ctrl-C
_WAITING_CONNECTIONS = 2048  # that the system holds for us
# Connections that are taken before anything else is done. asyncio takes as many as the system may hold: a
# burst of hundreds would hold up tokens of those served, and its own first requests, for all the others.
_ACCEPTED_AT_ONCE = 8
_NEW_OBJECTS = 100_000  # that make the collector look: some 15 MB
_HURRY_SECONDS = 1.0  # the application gets that long to end after it


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a user chooses about the server itself."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 for every network
    port: int = 8000  # 0: a free one
    served_model_names: tuple[str, ...] = ()  # what clients may call it; empty: the model's name
    grace_seconds: float = 5.0  # running requests get that long when the server is stopped
    access_log: bool = False  # one line a request
    log_format: str = "text"  # of log lines: text or json
    otlp_endpoint: str | None = None  # takes traces; None: what OTEL_EXPORTER_OTLP_ENDPOINT says
    metrics_compat: str | None = None  # "vllm": its metric names too
    allowed_origins: tuple[str, ...] = ()  # web sites that may call the API (CORS)
    data_dir: Path | None = None  # keeps files and batches; None: only while the server runs
    in_process: bool = (
        False  # the engine's steps run in a thread here, not in a process of their own
    )
    enable_admin: bool = False  # answer POST /admin/reload, sleep and wake
    # How an engine process that died or hung is replaced; in this process it is not.
    restarts: RestartConfig = field(default_factory=RestartConfig)
    hang_seconds: float | None = 120.0  # a step that takes longer has hung; None: may take for ever
    load_seconds: float | None = (
        1800.0  # a phase of loading that takes longer has hung; None: never
    )
    api_keys: Path | None = None  # file of keys; None: everybody may do everything
    request_timeout: float | None = (
        None  # seconds after which any answer ends as it is; None: never
    )
    prompt_log: Path | None = None  # folder for prompts and answers; None: they are not logged
    max_connections: int = 4096  # open at once; more are refused
    max_body_bytes: int = 32 << 20  # larger request bodies are refused

    def __post_init__(self) -> None:
        if self.request_timeout is not None and not 0 < self.request_timeout < math.inf:
            raise ConfigError(
                f"--request-timeout must be greater than 0, got {self.request_timeout:g}"
            )
        for name in ("max_connections", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def bind(host: str, port: int) -> socket.socket:
    """Take the port.

    Raises:
        ConfigError: it is taken, not allowed, or the host is not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"can't listen on host {host!r}: {_reason(error)}") from None
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # Listening now, not when the server starts: a second server must fail at once.
        taken.listen(_WAITING_CONNECTIONS)
    except OSError as error:
        taken.close()
        hint = "choose another with --port" if error.errno in (13, 98, 48) else "check --host"
        raise ConfigError(f"can't listen on {host} port {port}: {_reason(error)}; {hint}") from None
    return taken


def serve(config: EngineConfig, server: ServerConfig, say: Callable[[str], None] = print) -> int:
    """Serve until stopped. Returns the process's exit status.

    Args:
        say: prints a line for the user.

    Raises:
        ConfigError: the port can't be had; nothing was loaded then.
    """
    from halyard.runtime.process_port import end_all, launch

    traces = open_traces(server.otlp_endpoint)
    keys = KeyRing(server.api_keys) if server.api_keys is not None else None
    tenancy = Tenancy(keys, server.request_timeout, server.prompt_log)
    listener = bind(server.host, server.port)
    # The engine's process starts at once: what this one imports takes half a second.
    starting = None if server.in_process else launch(config)
    from halyard.api.app import create_app
    from halyard.api.loading import ServedModel

    model = ServedModel(
        config,
        in_process=server.in_process,
        hang_seconds=server.hang_seconds,
        load_seconds=server.load_seconds,
        starting=starting,
    )
    url = _url(server.host, listener.getsockname()[1])
    say(f"Halyard listens on {url} and loads {config.model} ...")
    failures: list[BaseException] = []

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        process.should_exit = True

    def on_ready(loaded: Loaded) -> None:
        # What is there now stays. The collector takes 60 ms to look through it, in which no stream
        # gets a token, and hundreds of streams make it look often.
        gc.freeze()
        # And it looks after every 700 new objects, which one delivery to 256 streams makes three times
        # over: a tenth of the time of a busy server. What makes cycles is connections, five objects each.
        # 256 requests under way are 18,000: were it to look at so many, each such burst would wait 10 ms.
        gc.set_threshold(_NEW_OBJECTS)
        for line in _welcome(url, host, loaded, keys is not None):
            say(line)

    host = EngineHost(model, server.served_model_names, on_failure, on_ready, server.restarts)
    host.admin = server.enable_admin or keys is not None  # then the guard asks for an admin's key
    host.compat_vllm = server.metrics_compat == "vllm"
    host.watch_phases(lambda phase: say(f"  {phase}"))
    app = create_app(
        host,
        max_body_bytes=server.max_body_bytes,
        allowed_origins=server.allowed_origins,
        data_dir=server.data_dir,
        tenancy=tenancy,
        traces=traces,
    )
    process = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # ours knows the request's id
            server_header=False,
            http=protocol_of(ConnectionLimits(max_connections=server.max_connections)),
            ws="none",
            # uvloop, where it is installed, takes 15 % longer for 256 streams that begin at once.
            loop="asyncio",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            lifespan="on",
        ),
        host,
        server.grace_seconds,
        say,
        lambda: keys.refresh(now=True) if keys is not None else None,
    )
    process.run(sockets=[listener])
    status = _INTERRUPTED if process.force_exit else 0
    if failures:
        error = failures[0]
        if not isinstance(error, HalyardError):
            logger.error("loading failed", exc_info=error)
        print(f"halyard: {_one_line(error)}", file=sys.stderr, flush=True)
        status = _FAILED
    if host.loading:
        # A compiler or a download still runs in its thread; the interpreter would wait for it.
        end_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class _Server(uvicorn.Server):
    """Uvicorn, with a shutdown that gives every running request an answer."""

    def __init__(
        self,
        config: uvicorn.Config,
        host: EngineHost,
        grace_seconds: float,
        say: Callable[[str], None],
        on_hangup: Callable[[], None] = lambda: None,
    ) -> None:
        config.backlog = _ACCEPTED_AT_ONCE
        super().__init__(config)
        self._on_hangup = on_hangup
        self._host = host
        self._grace_seconds = grace_seconds
        self._say = say

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Like uvicorn's, but the signal is not raised again at the end: stopping is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in caught}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: self._on_hangup())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or ():  # asyncio has told the system to hold as few as it takes at once
            one.listen(_WAITING_CONNECTIONS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in self.servers:
            listening.close()
        if self._host.num_requests:
            self._say(
                f"Stopping: {self._host.num_requests} requests get {self._grace_seconds:g} s to "
                "finish; Ctrl-C again stops at once"
            )
        await self._host.close(self._grace_seconds, lambda: self.force_exit)
        await asyncio.sleep(0)  # answers that the close made possible
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the application as it is then
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), _HURRY_SECONDS)


def _welcome(url: str, host: EngineHost, loaded: Loaded, keys: bool) -> list[str]:
    client = loaded.client
    name = host.served_names[0]
    chat = client.tokenizer is not None and client.tokenizer.has_chat_template
    if chat:
        path, body = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
    else:
        prompt = '"def "' if client.tokenizer is not None else "[1, 2, 3]"
        path, body = "completions", f'"prompt": {prompt}'
    return [
        f"Ready: {name} on {client.backend_name} ({loaded.device}, {loaded.dtype}), "
        f"context {client.max_model_len} tokens",
        f"  chat in a browser   {url}/",
        f"  OpenAI base URL     {url}/v1",
        f"  try                 curl {url}/v1/{path} -H 'content-type: application/json' "
        + ('-H "authorization: Bearer $KEY" ' if keys else "")
        + f'-d \'{{"model": "{name}", {body}}}\'',
        "  Ctrl-C stops; log lines go to standard error",
    ]


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown and shown[0] != '[' else shown}:{port}"


def _reason(error: OSError | UnicodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, HalyardError) else f"{type(error).__name__}: {text}"
