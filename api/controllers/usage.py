"""GET /v1/usage: what tenants have used, and what that costs."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, get

from halyard.api.deps import host_of
from halyard.api.tenancy import Tenancy
from halyard.api.tenants import caller
from halyard.api.usage import Price, usage_of

__all__ = ["UsageController"]


class UsageController(Controller):
    """For whoever pays."""

    path = "/v1/usage"
    tags = ("Server",)

    @get()
    async def usage(self, request: Request[Any, Any, Any]) -> dict[str, Any]:
        """The caller's own tenant's; every tenant's for an admin."""
        tenancy: Tenancy = request.app.state.tenancy
        host = host_of(request)
        stats = host.client.stats()
        price = Price.of(host.cost_per_hour, stats)
        me = caller().tenant
        data = [
            usage_of(name, meter, price)
            for name, meter in sorted(tenancy.meters.items())
            if me.admin or name == me.name
        ]
        return {
            "object": "list",
            "since": int(tenancy.since),
            "cost_per_hour": price.per_hour,
            "cost_per_million_tokens": price.per_million,
            "data": data,
        }
