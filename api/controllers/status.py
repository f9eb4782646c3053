"""What the page draws: curves, requests and blocks, the plan, the conformance matrix."""

from typing import Any

from litestar import Controller, Request, get

from halyard.api import status_views
from halyard.api.deps import host_of
from halyard.api.history import SAMPLE_SECONDS
from halyard.api.pictures import Pictures
from halyard.api.schemas.status import ConformanceMatrix, History, Live, Plan
from halyard.api.tenants import caller

__all__ = ["StatusController"]


class StatusController(Controller):
    """For the page, and for whoever likes JSON better."""

    tags = ("Server",)
    path = "/status"

    @get("/history")
    async def history(self, request: Request[Any, Any, Any]) -> History:
        """The last five minutes: throughput, queues, memory, latencies."""
        return History(SAMPLE_SECONDS, list(request.app.state.history.samples))

    @get("/live")
    async def live(self, request: Request[Any, Any, Any]) -> Live:
        """Requests that run or wait, and the state of every KV block."""
        client = host_of(request).present_client
        pictures: Pictures = request.app.state.pictures
        picture = await pictures.take(client) if client is not None else None
        if picture is None:
            return Live(available=False)
        tenant = caller().tenant
        return status_views.live(picture, None if tenant.admin else tenant.name)

    @get("/plan")
    async def plan(self, request: Request[Any, Any, Any]) -> Plan:
        """What was decided before the engine was built, and why, as `halyard plan` says it."""
        client = host_of(request).present_client
        if client is None:
            return Plan(None)
        facts = client.port.facts
        return Plan(facts.plan or None, facts.start_seconds, client.stats().fallbacks)

    @get("/conformance", sync_to_thread=True)
    def conformance(self, request: Request[Any, Any, Any]) -> ConformanceMatrix:
        """Backends, and what their conformance reports say."""
        client = host_of(request).present_client
        return status_views.conformance(client.backend_name if client is not None else None)
