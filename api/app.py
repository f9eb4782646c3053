"""The application: routes, errors, request ids. No engine is built here."""

import re
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.enums import ScopeType
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from halyard import __version__
from halyard.api.batches import BatchStore
from halyard.api.controllers.batches import BatchController, FileController
from halyard.api.controllers.chat import ChatController
from halyard.api.controllers.completions import CompletionController
from halyard.api.controllers.messages import MessageController
from halyard.api.controllers.models import ModelController
from halyard.api.controllers.page import PageController
from halyard.api.controllers.responses import ResponseController
from halyard.api.controllers.server import ServerController
from halyard.api.controllers.tokens import TokenController
from halyard.api.errors import exception_handler
from halyard.api.files import FileStore
from halyard.api.host import EngineHost
from halyard.api.response_store import ResponseStore

__all__ = ["MAX_BODY_BYTES", "create_app"]

MAX_BODY_BYTES = 32 << 20
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def create_app(
    host: EngineHost,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    allowed_origins: Sequence[str] = (),
    data_dir: Path | None = None,
) -> ASGIApp:
    """The server around an engine that `host` loads once the server has started.

    Args:
        max_body_bytes: a larger request body is refused with 413.
        allowed_origins: web sites whose scripts may call the API (CORS).
        data_dir: keeps files and batches; None: a folder that goes away with the server.
    """
    passing = tempfile.TemporaryDirectory(prefix="halyard-") if data_dir is None else None
    folder = data_dir or Path(passing.name if passing is not None else "")
    files = FileStore(folder / "files")
    batches = BatchStore(folder / "batches", files, host)

    async def start(_: Litestar) -> None:
        host.start()
        batches.start()

    async def stop(_: Litestar) -> None:
        batches.stop()
        await host.close(0.0)
        if passing is not None:
            passing.cleanup()

    app = Litestar(
        route_handlers=[
            BatchController,
            ChatController,
            CompletionController,
            MessageController,
            FileController,
            ModelController,
            ResponseController,
            ServerController,
            TokenController,
            PageController,
        ],
        state=State(
            {"host": host, "responses": ResponseStore(), "files": files, "batches": batches}
        ),
        exception_handlers={Exception: exception_handler},
        on_startup=[start],
        on_shutdown=[stop],
        request_max_body_size=max_body_bytes,
        cors_config=CORSConfig(allow_origins=list(allowed_origins)) if allowed_origins else None,
        openapi_config=OpenAPIConfig(
            title="Halyard",
            version=__version__,
            path="/schema",
            render_plugins=[
                JsonRenderPlugin(path=["/", "/openapi.json"]),
                YamlRenderPlugin(path="/openapi.yaml"),
            ],
        ),
        logging_config=None,
        debug=False,
    )
    # Around Litestar, not inside: its middleware doesn't see requests without a route.
    return _with_request_id(app)


def _with_request_id(app: ASGIApp) -> ASGIApp:
    """Every answer carries X-Request-Id: the client's own, or a new one."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        fine = _REQUEST_ID.fullmatch(given) is not None
        request_id = given if fine else f"req-{secrets.token_hex(8)}".encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await app(scope, receive, send_with_id)

    return middleware
