"""What a connection may do to the server: time limits on slow senders and readers, a bound on how many.

uvicorn's own protocol waits for ever for the rest of a request's head or body, and for a reader that
takes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ConnectionLimits", "LimitedProtocol", "protocol_of"]

logger = logging.getLogger("halyard.api")

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
    max_connections: int = 4096  # more are refused


class LimitedProtocol(H11Protocol):
    """One connection. A limit that is passed ends it; the request that ran on it is cancelled."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

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
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.IDLE:
            if self.conn.trailing_data[0]:
                self._await_head()  # the head of a further request has begun
            return
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if state is not h11.SEND_BODY:
            self._end_body()
        elif self._body_timer is None:
            self._body_since, self._body_bytes = time.monotonic(), len(data)
            self._body_timer = self.loop.call_later(self.limits.body_seconds, self._check_body)
        else:
            self._body_bytes += len(data)

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
        if self.conn.their_state is not h11.SEND_BODY:
            return
        elapsed = time.monotonic() - self._body_since
        if self.flow.read_paused:  # that we read slowly is not the client's fault
            self._body_since += elapsed
        elif self._body_bytes < elapsed * self.limits.body_bytes_per_second:
            self._cut(f"its request body came at {self._body_bytes / elapsed:.0f} bytes a second")
            return
        self._body_timer = self.loop.call_later(self.limits.body_seconds, self._check_body)

    def _end_body(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _stalled(self) -> None:
        self._stall_timer = None
        self._cut(f"its reader took nothing for {self.limits.stall_seconds:g} s")

    def _cut(self, why: str) -> None:
        logger.warning(
            "a connection from %s was cut: %s", self.client[0] if self.client else "?", why
        )
        self.transport.abort()


def protocol_of(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """The protocol with other limits, as uvicorn takes it."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
