"""What a connection may do to the server: time limits on slow senders and readers, a bound on how many.

uvicorn's own protocol waits for ever for the rest of a request's head or body, and for a reader that
takes nothing. Of its two this is the one with a parser in C: the other takes half as long again for a
request, which is what a load that begins with hundreds of them waits for. What that one refused and this
one wouldn't is refused here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from halyard.api.errors import ApiError

__all__ = ["ConnectionLimits", "LimitedProtocol", "protocol_of"]

logger = logging.getLogger("halyard.api")

_MOST_PIPELINED = 16  # requests of a connection that wait behind one that is being answered

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: 129\r\n\r\n"
    b'{"error":{"message":"too many connections: try again later","type":"service_unavailable",'
    b'"param":null,"code":"connections_full"}}'
)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """For every connection."""

    head_seconds: float = 15.0  # for a request's first line and headers
    body_seconds: float = 20.0  # after that its body must have come at the least rate, on average
    body_bytes_per_second: float = 1024.0  # the least rate
    stall_seconds: float = 30.0  # a reader that takes nothing for that long is cut off
    head_bytes: int = 64 << 10  # a longer first line and headers are refused
    max_connections: int = 4096  # more are refused


class _Part(Enum):
    """What of a request is to come."""

    START = "start"  # nothing has
    HEAD = "head"
    BODY = "body"


class _BadRequestError(Exception):
    """No request that is answered; the text says why."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. A limit that is passed ends it; the request that ran on it is cancelled."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    _part = _Part.START
    _ended = False  # a request did, in the bytes that are being read
    _head_length = 0  # bytes of the head so far
    _resuming = False  # the parser is told again of a head that was dealt with
    _broken = False  # what comes is not read any more
    _cycles: tuple[RequestResponseCycle, ...] = ()  # requests without a whole answer, in order

    _head_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _body_since = 0.0
    _body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            logger.warning("a connection was refused: %d are open", len(self.connections) - 1)
            transport.write(_FULL)
            transport.close()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._body_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        for cycle in self._under_way():  # the parent tells the last one alone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    # -- reading ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._broken:
            return
        self._unset_keepalive_if_required()
        self._ended = False
        if self._part is not _Part.BODY:
            self._head_length += len(data)
        try:
            self._parse(data)
            if self._part is _Part.HEAD and self._head_length > self.limits.head_bytes:
                raise _BadRequestError("its head is too long")
        except httptools.HttpParserError as error:  # from a callback: with what that raised
            self._refuse(str(error.__context__ or error))
            return
        except _BadRequestError as error:
            self._refuse(str(error))
            return
        self._set_timers(len(data))

    def _parse(self, data: bytes) -> None:
        """Raises HttpParserError if this is no HTTP."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # It is answered as if it had not asked for that. The parser takes what follows for the
                # other protocol, even its body: HTTP clients that would rather speak HTTP/2 send one.
                data = data[upgrade.args[0] :]
                if self._part is _Part.BODY:
                    self._resume()

    def _resume(self) -> None:
        """A parser that goes on behind the head of this request."""
        framing = [
            b"%b: %b\r\n" % header
            for header in self.headers
            if header[0] in (b"content-length", b"transfer-encoding")
        ]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._resuming = True
        self.parser.feed_data(b"".join((b"POST / HTTP/1.1\r\n", *framing, b"\r\n")))
        self._resuming = False

    def on_message_begin(self) -> None:
        if not self._resuming:
            self._part = _Part.HEAD
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part is _Part.HEAD:  # behind a body of chunks they are nobody's
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._resuming:
            return
        self._check_head()
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise _BadRequestError("too many were sent at once")
        super().on_headers_complete()
        self._cycles = (*self._under_way(), self.cycle)
        self._part, self._head_length = _Part.BODY, 0

    def on_message_complete(self) -> None:
        if self._resuming or (self.parser.should_upgrade() and self._has_body()):
            return  # it comes: see _parse
        self._part, self._ended = _Part.START, True
        super().on_message_complete()

    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and int(value))
            for name, value in self.headers
        )

    def _check_head(self) -> None:
        """Raises _BadRequestError for what the parser lets pass."""
        length = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if length > self.limits.head_bytes:
            raise _BadRequestError("its head is too long")
        if self.parser.get_method() == b"CONNECT":
            raise _BadRequestError("this server is no proxy")
        names = [name for name, _ in self.headers]
        modern = self.parser.get_http_version() == "1.1"
        if names.count(b"host") > 1 or (modern and b"host" not in names):
            raise _BadRequestError("it must have one host header")
        encodings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if encodings and (encodings != [b"chunked"] or not modern):
            raise _BadRequestError("its transfer-encoding is not supported")

    def _under_way(self) -> tuple[RequestResponseCycle, ...]:
        return tuple(cycle for cycle in self._cycles if not cycle.response_complete)

    def _refuse(self, why: str) -> None:
        """What came is no request, or the body of one that ends here. Those before it are answered."""
        logger.warning(
            "a connection from %s sent no valid HTTP request: %s", self._peer(), why[:200]
        )
        self._broken = True
        self._end_head()
        self._end_body()
        waiting = list(self._under_way())
        if waiting and self._part is _Part.BODY:
            last = waiting.pop()
            last.disconnected = True
            last.message_event.set()
            if self.pipeline and self.pipeline[0][0] is last:
                self.pipeline.popleft()
            if not waiting and last.response_started:
                self.transport.close()
                return
        if waiting:
            waiting[-1].keep_alive = False
            return
        text = f"this is no valid HTTP request: {why[:200]}"
        body = ApiError(400, text, "invalid_request_error", None, "invalid_http").body()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _set_timers(self, length: int) -> None:
        """After so many bytes."""
        if self._part is _Part.HEAD or (self._part is _Part.START and not self._ended):
            self._end_body()
            if not self._under_way():
                self._await_head()
            return
        self._end_head()
        if self._part is not _Part.BODY:
            self._head_length = 0
            self._end_body()
        elif self._body_timer is None:
            self._body_since, self._body_bytes = time.monotonic(), length
            self._body_timer = self.loop.call_later(self.limits.body_seconds, self._check_body)
        else:
            self._body_bytes += length

    # -- limits -------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stall_seconds, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_seconds, self._head_late)

    def _head_late(self) -> None:
        self._cut(f"no whole request head came in {self.limits.head_seconds:g} s")

    def _check_body(self) -> None:
        self._body_timer = None
        if self._part is not _Part.BODY:
            return
        elapsed = time.monotonic() - self._body_since
        if self.flow.read_paused:  # that we read slowly is not the client's fault
            self._body_since += elapsed
        elif self._body_bytes < elapsed * self.limits.body_bytes_per_second:
            self._cut(f"its request body came at {self._body_bytes / elapsed:.0f} bytes a second")
            return
        self._body_timer = self.loop.call_later(self.limits.body_seconds, self._check_body)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_body(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _stalled(self) -> None:
        self._stall_timer = None
        self._cut(f"its reader took nothing for {self.limits.stall_seconds:g} s")

    def _peer(self) -> str:
        return self.client[0] if self.client else "?"

    def _cut(self, why: str) -> None:
        logger.warning("a connection from %s was cut: %s", self._peer(), why)
        self.transport.abort()


def protocol_of(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """The protocol with other limits, as uvicorn takes it."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
