"""Answers on the wire that notice when the client goes away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from litestar.types import Receive, Scope, Send

from halyard.api.errors import ApiError, to_api_error

__all__ = ["DONE", "EventStream", "JsonAnswer", "TextEvents", "event", "named_event"]

logger = logging.getLogger("halyard.api")

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def event(value: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def named_event(name: str, /, **fields: Any) -> bytes:
    """One server-sent event with a name, which is its type too."""
    body = _encoder.encode({"type": name, **fields})
    return b"event: " + name.encode() + b"\ndata: " + body + b"\n\n"


class TextEvents:
    """Events that differ in one text alone: the rest is written once. Most of a stream's are such.

    Args:
        sample: such an event's value, with an empty text.
        field: the text's name, which has no other empty text.
    """

    __slots__ = ("_after", "_before")

    def __init__(self, sample: msgspec.Struct, field: str) -> None:
        # Within a JSON string the quotes would be escaped: only the field itself reads like this.
        before, name, after = event(sample).partition(b'"%b":""' % field.encode())
        if not name:
            raise AssertionError(f"no empty {field} in {before!r}")
        self._before, self._after = before + name[:-2], after

    def __call__(self, text: str) -> bytes:
        return self._before + _encoder.encode(text) + self._after


def _plain_error_event(error: ApiError) -> bytes:
    return b"data: " + error.body() + b"\n\n"


class JsonAnswer:
    """ASGI: computes a value while watching the connection; answers with it as JSON.

    Args:
        cancel: called at the end in any case; frees what the request still holds.
        on_error: told about every failure.
        error_body: writes a failure.
    """

    def __init__(
        self,
        work: Coroutine[Any, Any, msgspec.Struct | dict[str, Any]],
        cancel: Callable[[], None],
        on_error: Callable[[BaseException], None],
        error_body: Callable[[ApiError], bytes] = ApiError.body,
    ) -> None:
        self._error_body = error_body
        self._work = work
        self._cancel = cancel
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {}
        try:
            value = await _unless_gone(self._work, receive)
            if value is None:
                return  # nobody is there to read an answer
            status, body = 200, _encoder.encode(value)
        except Exception as error:  # noqa: BLE001  # the boundary: told to the client, logged, counted
            self._on_error(error)
            told = to_api_error(error)
            status, body, headers = told.status, self._error_body(told), told.headers
        finally:
            self._cancel()
        await _start(send, status, b"application/json", headers, len(body))
        await send({"type": "http.response.body", "body": body, "more_body": False})


class EventStream:
    """ASGI: sends events as they come; an error becomes the last event.

    Args:
        events: encoded events.
        cancel: called at the end in any case, at once when the client goes away.
        on_error: told about every failure.
        error_event: writes a failure.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        cancel: Callable[[], None],
        on_error: Callable[[BaseException], None],
        error_event: Callable[[ApiError], bytes] = _plain_error_event,
    ) -> None:
        self._error_event = error_event
        self._events = events
        self._cancel = cancel
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(self._send_all(send), receive)
        finally:
            self._cancel()

    async def _send_all(self, send: Send) -> bool:
        await _start(send, 200, b"text/event-stream; charset=utf-8", {"cache-control": "no-cache",
                                                                      "x-accel-buffering": "no"})  # fmt: skip
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:  # noqa: BLE001  # the boundary: told to the client, logged, counted
            self._on_error(error)
            body = self._error_event(to_api_error(error))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


async def _start(
    send: Send, status: int, media_type: bytes, headers: dict[str, str], length: int | None = None
) -> None:
    raw = [(b"content-type", media_type)]
    if length is not None:
        raw.append((b"content-length", str(length).encode()))
    raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T | None:
    """The result of `work`; None, and `work` cancelled, if the client disconnects before.

    It runs in this task, not in one of its own: hundreds of requests may come at once.
    """
    own = asyncio.current_task()
    if own is None:
        raise AssertionError("not in a task")
    gone = False

    def leave(watching: asyncio.Task[None]) -> None:
        nonlocal gone
        gone = True
        watching.exception()  # a connection that can't be watched is gone too
        own.cancel()  # `work` waits for something now, and is told there

    watching = asyncio.ensure_future(_disconnected(receive))
    watching.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or own.cancelling() > 1:  # somebody else wants this task to end
            raise
        return None
    finally:
        watching.remove_done_callback(leave)
        watching.cancel()
        if gone:
            own.uncancel()


async def _disconnected(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
