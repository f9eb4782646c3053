"""The door: once there are keys, nothing but /health and /ready is answered without one.

Around the whole application, so that it also covers routes that nobody thought of, and those that
don't exist. It decides who calls before anything else of a request is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from halyard.api.context import current
from halyard.api.errors import ApiError, ForbiddenError, UnauthorizedError, to_api_error
from halyard.api.message_answers import error_body
from halyard.api.tenancy import Tenancy
from halyard.api.tenants import STRANGER, Caller, act_as
from halyard.hal.errors import HalyardError, RequestError

__all__ = ["ADMIN", "PUBLIC", "guard"]

PUBLIC = ("/health", "/ready")
"""Paths for everybody, by GET. They say whether the server is up; why not, only to who has a key."""

ADMIN = ("/admin", "/metrics")
"""Paths, with everything below them, that need an admin's key: they show or change what is others'."""


class _FramingError(RequestError):
    """Two parties may disagree on where this request ends."""


_READS = ("GET", "HEAD", "OPTIONS")


def guard(
    app: ASGIApp,
    tenancy: Tenancy,
    observe: Callable[[str], None],
    preflights: bool = False,
) -> ASGIApp:
    """The application behind the door.

    Args:
        observe: told the code of every refusal, for the metrics.
        preflights: let browsers' CORS questions through, which never carry a key.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.WEBSOCKET:
            await send({"type": "websocket.close", "code": 1008, "reason": "not served"})
            return
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        try:
            who = _admit(scope, tenancy, preflights)
        except HalyardError as error:
            told = to_api_error(error)
            if isinstance(error, _FramingError):  # where the next request begins is in doubt
                told.headers["connection"] = "close"
            observe(told.code or told.type)
            await _refuse(scope, send, told)
            return
        # Set for every request: asyncio may hand a connection's next task the context of the last.
        act_as(who)
        await app(scope, receive, _with_limits(send, who))

    return guarded


def _admit(scope: HTTPScope, tenancy: Tenancy, preflights: bool) -> Caller:
    """
    Raises:
        UnauthorizedError, ForbiddenError, RateLimitedError, RequestError: it may not come in.
    """
    headers = scope["headers"]
    names = [name for name, _ in headers]
    if b"content-length" in names and b"transfer-encoding" in names:
        # What a proxy before us and this server may read as different requests.
        raise _FramingError("content-length and transfer-encoding exclude each other")
    method, path = scope["method"], scope["path"]
    if tenancy.keys is not None:
        if path in PUBLIC and method in _READS:
            return _known_or_stranger(headers, tenancy)
        if preflights and method == "OPTIONS" and b"access-control-request-method" in names:
            return STRANGER
    tenant, way = tenancy.recognise(headers)
    if way == "basic" and method not in _READS:
        _check_same_origin(headers)
    if not tenant.admin and any(path == top or path.startswith(top + "/") for top in ADMIN):
        raise ForbiddenError(f"{path} needs an admin's key")
    timeout = _header(headers, b"x-request-timeout")
    who = tenancy.caller(tenant, timeout)
    context = current.get()
    if context is not None and who.known:
        context.tenant = tenant.name
    if method == "POST":
        who.meter.count_request(tenant.requests_per_minute)
    return who


def _known_or_stranger(headers: Iterable[tuple[bytes, bytes]], tenancy: Tenancy) -> Caller:
    """Nobody is turned away here; who brings a key is told more."""
    try:
        tenant, _ = tenancy.recognise(headers)
    except UnauthorizedError:
        return STRANGER
    return tenancy.caller(tenant)


def _check_same_origin(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """A browser sends a key that it was told at its prompt with every request, also another site's.

    Raises:
        ForbiddenError: another site made this one.
    """
    site, origin = _header(headers, b"sec-fetch-site"), _header(headers, b"origin")
    fine = site in (None, "same-origin", "none")
    if origin is not None and urlsplit(origin).netloc != _header(headers, b"host"):
        fine = False
    if not fine:
        raise ForbiddenError("another web site may not use the key that this browser remembers")


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in headers if name == wanted), None)


def _with_limits(send: Send, who: Caller) -> Send:
    tenant = who.tenant
    if tenant.requests_per_minute is None and tenant.tokens_per_minute is None:
        return send

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            left = who.meter.headers(tenant.requests_per_minute, tenant.tokens_per_minute)
            message["headers"] = [*message["headers"], *_raw(left)]
        await send(message)

    return send_with_limits


async def _refuse(scope: HTTPScope, send: Send, told: ApiError) -> None:
    path = scope["path"]
    anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
    body = error_body(told) if anthropic else told.body()
    headers = dict(told.headers)
    if told.status == 401:
        headers["www-authenticate"] = _challenge(scope)
    raw = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *_raw(headers),
    ]
    await send({"type": "http.response.start", "status": told.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _challenge(scope: HTTPScope) -> str:
    """People who open the page are asked for a key by their browser; programs are just told."""
    wants_page = "text/html" in (_header(scope["headers"], b"accept") or "")
    if scope["method"] == "GET" and wants_page and not scope["path"].startswith("/v1/"):
        return 'Basic realm="Halyard: any name, an API key as the password", charset="UTF-8"'
    return 'Bearer realm="Halyard"'


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
