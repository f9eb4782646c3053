"""Around every HTTP request: its id, the line in the access log, its span."""

from __future__ import annotations

import logging
import re
import secrets
import time

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from halyard.api.context import RequestContext, current
from halyard.api.logs import access_line
from halyard.api.traces import Traces

__all__ = ["with_context"]

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_access = logging.getLogger("halyard.access")


def with_context(app: ASGIApp, traces: Traces | None) -> ASGIApp:
    """Every answer carries X-Request-Id: the client's own, or a new one.

    Around Litestar, not inside: its middleware doesn't see requests without a route.
    """

    async def boundary(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        fine = _REQUEST_ID.fullmatch(given) is not None
        request_id = given if fine else f"req-{secrets.token_hex(8)}".encode()
        context = RequestContext(request_id.decode("ascii"), traces=traces)
        status = 0  # nothing was answered
        whole = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        method, path = scope["method"], scope["path"]
        started = time.monotonic()
        if traces is not None:
            traces.begin(method, path, scope["headers"], context)
        token = current.set(context)
        # HEAD is GET whose body the HTTP server leaves out: it looks at its own scope.
        inner: Scope = {**scope, "method": "GET"} if method == "HEAD" else scope
        try:
            await app(inner, receive, send_with_id)
        finally:
            if traces is not None:
                route = inner.get("path_template") or ""
                traces.end(context, route if isinstance(route, str) else "", status, whole)
            if _access.isEnabledFor(logging.INFO):
                seconds = time.monotonic() - started
                access_line(method, path, status, seconds, scope.get("client") or ())
            current.reset(token)

    return boundary
