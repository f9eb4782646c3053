"""Knows which requests are being answered, and holds new ones while the engine is exchanged in place."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

__all__ = ["Gate"]

_MAX_HELD = 2048  # more are not held: they are told that the server is not ready
_MAX_SECONDS = 300.0


class Gate:
    """Around the application. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._inside: set[object] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._held = 0
        self.on_knock: Callable[[], None] = lambda: None  # a request comes: may close the gate

    @property
    def num_held(self) -> int:
        return self._held

    def close(self) -> None:
        """Hold requests that come from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let them go on."""
        self._open.set()

    async def drained(self) -> None:
        """Until every request that is inside now has been answered."""
        inside = set(self._inside)
        while inside & self._inside:
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def passage(self) -> AsyncIterator[None]:
        """For requests that come another way than over HTTP, and have time: held while it is closed."""
        self.on_knock()
        while not self._open.is_set():
            await self._open.wait()
        ticket = object()
        self._inside.add(ticket)
        try:
            yield
        finally:
            self._inside.discard(ticket)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, with its requests to /v1 counted and, while the gate is closed, held."""

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != ScopeType.HTTP or not scope["path"].startswith("/v1/"):
                await app(scope, receive, send)
                return
            self.on_knock()
            if not self._open.is_set() and self._held < _MAX_HELD:
                self._held += 1
                try:
                    await asyncio.wait_for(self._open.wait(), _MAX_SECONDS)
                except TimeoutError:
                    pass  # it is told that the server is not ready
                finally:
                    self._held -= 1
            ticket = object()
            self._inside.add(ticket)
            try:
                await app(scope, receive, send)
            finally:
                self._inside.discard(ticket)

        return gated
