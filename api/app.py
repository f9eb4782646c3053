"""The application: routes, errors, request ids. No engine is built here."""

import asyncio
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.openapi import OpenAPIConfig
from litestar.types import ASGIApp

from halyard import __version__
from halyard.api.batches import BatchStore
from halyard.api.boundary import with_context
from halyard.api.controllers.admin import AdminController
from halyard.api.controllers.batches import BatchController, FileController
from halyard.api.controllers.chat import ChatController
from halyard.api.controllers.completions import CompletionController
from halyard.api.controllers.embeddings import EmbeddingController
from halyard.api.controllers.messages import MessageController
from halyard.api.controllers.models import ModelController
from halyard.api.controllers.page import PageController
from halyard.api.controllers.responses import ResponseController
from halyard.api.controllers.server import ServerController
from halyard.api.controllers.status import StatusController
from halyard.api.controllers.tokens import TokenController
from halyard.api.controllers.usage import UsageController
from halyard.api.errors import exception_handler
from halyard.api.files import FileStore
from halyard.api.guard import guard
from halyard.api.history import SAMPLE_SECONDS, History
from halyard.api.host import EngineHost
from halyard.api.openapi import JsonDocument, YamlDocument
from halyard.api.pictures import Pictures
from halyard.api.response_store import ResponseStore
from halyard.api.tenancy import Tenancy
from halyard.api.traces import Traces

__all__ = ["MAX_BODY_BYTES", "create_app"]

MAX_BODY_BYTES = 32 << 20


def create_app(
    host: EngineHost,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    allowed_origins: Sequence[str] = (),
    data_dir: Path | None = None,
    traces: Traces | None = None,
    tenancy: Tenancy | None = None,
) -> ASGIApp:
    """The server around an engine that `host` loads once the server has started.

    Args:
        max_body_bytes: a larger request body is refused with 413.
        allowed_origins: web sites whose scripts may call the API (CORS).
        data_dir: keeps files and batches; None: a folder that goes away with the server.
        traces: takes spans of requests; None: there are none. Closed with the server.
        tenancy: keys, limits and time limits; None: everybody may do everything.
    """
    tenancy = tenancy or Tenancy()
    passing = tempfile.TemporaryDirectory(prefix="halyard-") if data_dir is None else None
    folder = data_dir or Path(passing.name if passing is not None else "")
    files = FileStore(folder / "files")
    batches = BatchStore(folder / "batches", files, host, tenancy)

    watching: list[asyncio.Task[None]] = []
    history = History()

    async def start(_: Litestar) -> None:
        host.watch_ends(traces.finish if traces is not None else None)
        host.start()
        batches.start()
        watching.append(asyncio.create_task(tenancy.watch()))
        watching.append(asyncio.create_task(_sample(host, history)))

    async def stop(_: Litestar) -> None:
        batches.stop()
        for task in watching:
            task.cancel()
        await host.close(0.0)
        if passing is not None:
            passing.cleanup()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = Litestar(
        route_handlers=[
            AdminController,
            BatchController,
            ChatController,
            CompletionController,
            EmbeddingController,
            MessageController,
            FileController,
            ModelController,
            ResponseController,
            ServerController,
            StatusController,
            TokenController,
            UsageController,
            PageController,
        ],
        state=State(
            {
                "host": host,
                "responses": ResponseStore(),
                "files": files,
                "batches": batches,
                "tenancy": tenancy,
                "history": history,
                "pictures": Pictures(),
            }
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
                JsonDocument(path=["/", "/openapi.json"]),
                YamlDocument(path="/openapi.yaml"),
            ],
        ),
        logging_config=None,
        debug=False,
    )
    refused = partial(host.observe_error, tenant="")  # nobody knows whose request it was
    return with_context(
        guard(host.gate.around(app), tenancy, refused, bool(allowed_origins)), traces
    )


async def _sample(host: EngineHost, history: History) -> None:
    """Keep the page's curves going, whether or not anybody looks."""
    while True:
        client = host.present_client
        if client is not None and client.alive:
            history.take(client.stats(), client.metrics)
        await asyncio.sleep(SAMPLE_SECONDS)
