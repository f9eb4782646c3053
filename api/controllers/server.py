"""Health, readiness, metrics, version, status."""

from typing import Any

from litestar import Controller, MediaType, Request, Response, get
from litestar.openapi import ResponseSpec

from halyard import __version__
from halyard.api.deps import host_of
from halyard.api.schemas.server import Health, Readiness, Status, VersionInfo
from halyard.api.state import PLAINLY
from halyard.api.tenants import caller
from halyard.runtime.metrics import CONTENT_TYPE

__all__ = ["ServerController"]


class ServerController(Controller):
    """For operators and the page."""

    tags = ("Server",)

    @get("/health")
    async def health(self, request: Request[Any, Any, Any]) -> Response[Health]:
        """200 while the process is up; 503 when its engine was given up: start it anew."""
        if host_of(request).given_up:
            return Response(Health("failed"), status_code=503)
        return Response(Health())

    @get("/ready")
    async def ready(self, request: Request[Any, Any, Any]) -> Response[Readiness]:
        """200 when requests are answered, else 503 with the reason: whole for whoever has a key."""
        readiness = host_of(request).readiness()
        if caller().stranger:
            readiness = Readiness(readiness.ready, PLAINLY[readiness.state], readiness.state)
        return Response(readiness, status_code=200 if readiness.ready else 503)

    @get("/metrics", responses={200: ResponseSpec(None, media_type=MediaType.TEXT)})
    async def metrics(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        """Prometheus' text format."""
        # Not as media_type: a charset would be added to the one that is there.
        return Response(
            host_of(request).metrics(),
            media_type=MediaType.TEXT,
            headers={"content-type": CONTENT_TYPE},
        )

    @get("/version")
    async def version(self) -> VersionInfo:
        """This server's version."""
        return VersionInfo(__version__)

    @get("/status")
    async def status(self, request: Request[Any, Any, Any]) -> Status:
        """What runs now, for the page."""
        return host_of(request).status()

    @get("/v1/provenance/{fingerprint:str}")
    async def provenance(self, request: Request[Any, Any, Any], fingerprint: str) -> dict[str, Any]:
        """What made answers with this system_fingerprint: files, backend, plan, versions."""
        return host_of(request).provenance(fingerprint)
