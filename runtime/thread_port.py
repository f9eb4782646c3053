"""An engine in a thread of this process: for tests, and for work that shares nothing with a server."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from halyard.hal.errors import EngineDeadError
from halyard.runtime.plan import TokenEvent
from halyard.runtime.port import Deliver, Died, EngineFacts
from halyard.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from halyard.runtime.engine import Engine, EngineStats
    from halyard.runtime.picture import EnginePicture

__all__ = ["ThreadPort"]

logger = logging.getLogger("halyard.engine")

T = TypeVar("T")
_Message = Request | tuple[str, int | None] | Callable[[], None]


class ThreadPort:
    """Runs the step loop in a thread. The two sides meet in the inbox and in `deliver`."""

    def __init__(self, engine: Engine, facts: EngineFacts) -> None:
        self.engine = engine
        self.facts = facts
        self.intake = engine.intake
        self.metrics = engine.metrics
        self._inbox: deque[_Message] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._failed = False
        self._added = 0
        self._taken = 0  # of those added, by the engine
        self._asked: set[asyncio.Future[EnginePicture]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="halyard-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return not self._failed and not self._stopping

    @property
    def num_waiting(self) -> int:
        return self.engine.num_waiting + self._added - self._taken

    def start(self, deliver: Deliver, died: Died) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver, self._died = deliver, died
        self._thread.start()

    def add(self, request: Request) -> None:
        self._added += 1
        self._send(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._send((request_id, index))

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def picture(self) -> EnginePicture:
        if not self.alive or self._loop is None:
            raise EngineDeadError("the engine has stopped")
        loop = self._loop
        taken: asyncio.Future[EnginePicture] = loop.create_future()

        def give(picture: EnginePicture) -> None:
            if not taken.done():
                taken.set_result(picture)

        def take() -> None:
            self._call(give, self.engine.picture())

        self._asked.add(taken)
        self._send(take)
        try:
            return await taken
        finally:
            self._asked.discard(taken)

    async def prepare(self, params: SamplingParams) -> None:
        if params.guided is not None:
            await asyncio.to_thread(self.intake.guidance, params)

    async def close(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._loop is None:
            self.engine.close()
        elif self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _send(self, message: _Message) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _refuse(self, reason: str) -> None:
        """The thread has ended: nobody answers what it was asked."""
        for future in self._asked:
            if not future.done():
                future.set_exception(EngineDeadError(reason))

    # -- the engine's thread ------------------------------------------------------------------

    def _run(self) -> None:
        """The step loop. An exception here is a bug or a device failure: nothing can go on."""
        try:
            while True:
                self._drain_inbox()
                if self.engine.has_work():
                    self._tell(self.engine.step())
                elif self._stopping:
                    return
                else:
                    self._wake.wait()
                    self._wake.clear()
        except Exception as error:
            logger.exception("the engine stopped")
            self._failed = True
            self._call(self._died, f"the engine stopped: {type(error).__name__}: {error}")
        finally:
            self._call(self._refuse, "the engine has stopped")
            self.engine.close()

    def _drain_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self.engine.add(message)
                self._taken += 1
            elif isinstance(message, tuple):
                self.engine.abort(*message)
            else:
                message()

    def _tell(self, events: list[TokenEvent]) -> None:
        if events:
            self._call(self._deliver, events)

    def _call(self, function: Callable[[T], None], value: T) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, value)
