"""Pictures of the engine for any number of open pages: one at a time, and none twice in a moment."""

import asyncio
import time

from halyard.hal.errors import EngineDeadError
from halyard.runtime.client import Client
from halyard.runtime.picture import EnginePicture

__all__ = ["Pictures"]

_FRESH_SECONDS = 0.4
_PATIENCE_SECONDS = 2.0  # a step may take longer; the page then says that it waits


class Pictures:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self._last: EnginePicture | None = None
        self._time = 0.0
        self._client: Client | None = None
        self._under_way: asyncio.Task[EnginePicture] | None = None

    async def take(self, client: Client) -> EnginePicture | None:
        """The engine now, or a moment ago; None if it doesn't answer."""
        if client is not self._client:
            self._client, self._last, self._under_way = client, None, None
        if self._last is not None and time.monotonic() - self._time < _FRESH_SECONDS:
            return self._last
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.create_task(client.picture())
        try:
            waited = asyncio.shield(self._under_way)
            self._last = await asyncio.wait_for(waited, _PATIENCE_SECONDS)
        except (TimeoutError, EngineDeadError):
            return None
        self._time = time.monotonic()
        return self._last
