"""POST /admin/...: for whoever runs the server. Off unless it was started so."""

from typing import Any

from litestar import Controller, Request, post

from halyard.api.convert import decode_body
from halyard.api.deps import host_of
from halyard.api.errors import AdminOffError
from halyard.api.host import EngineHost
from halyard.api.openapi import body_of
from halyard.api.rotation import reload_model
from halyard.api.schemas.admin import Asleep, Awake, Reloaded, ReloadRequest, SleepRequest
from halyard.api.sleep import put_to_sleep, wake_up

__all__ = ["AdminController"]


class AdminController(Controller):
    """Exchange the model, free the device's memory."""

    path = "/admin"
    tags = ("Admin",)

    @post("/reload", status_code=200, operation_class=body_of(ReloadRequest))
    async def reload(self, request: Request[Any, Any, Any]) -> Reloaded:
        """Serve another checkpoint, or the same one read anew. No request is dropped."""
        host = _admin(request)
        return await reload_model(host, decode_body(await request.body() or b"{}", ReloadRequest))

    @post("/sleep", status_code=200, operation_class=body_of(SleepRequest))
    async def sleep(self, request: Request[Any, Any, Any]) -> Asleep:
        """Free the device's memory; requests are answered 503 until it wakes."""
        host = _admin(request)
        return await put_to_sleep(host, decode_body(await request.body() or b"{}", SleepRequest))

    @post("/wake", status_code=200)
    async def wake(self, request: Request[Any, Any, Any]) -> Awake:
        """Answer again."""
        return await wake_up(_admin(request))


def _admin(request: Request[Any, Any, Any]) -> EngineHost:
    host = host_of(request)
    if not host.admin:
        raise AdminOffError("routes below /admin are off: start the server with --enable-admin")
    return host
