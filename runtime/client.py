"""The asyncio side of an engine: streams for requests, one thread for the step loop. No torch."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

from halyard.hal.errors import EngineDeadError, HalyardError, QueueFullError
from halyard.runtime.answer import Answers, IncrementalDecoder
from halyard.runtime.outputs import CompletionDelta, RequestDelta
from halyard.runtime.plan import TokenEvent
from halyard.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from halyard.models.tokenizer import Tokenizer
    from halyard.runtime.engine import Engine, EngineStats

__all__ = ["Client", "RequestStream"]

logger = logging.getLogger("halyard.engine")

SHUTTING_DOWN = "the server is shutting down"


class RequestStream(AsyncIterator[RequestDelta]):
    """The answers of one request as they come. Belongs to one event loop."""

    def __init__(self, request: Request, answers: Answers, cancel: Callable[[str], None]) -> None:
        self.request = request
        self.answers = answers
        self._cancel = cancel
        self._deltas: deque[RequestDelta] = deque()
        self._wake = asyncio.Event()
        self._closed = False  # no delta comes after those in the queue

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def cancel(self) -> None:
        """Give the request up: its blocks are freed at the next step. Idempotent."""
        if not self._closed:
            self._closed = True
            self._deltas.clear()
            self._wake.set()
            self._cancel(self.request_id)

    def put(self, delta: RequestDelta) -> None:
        if not self._closed:
            self._deltas.append(delta)
            self._closed = delta.finished
            self._wake.set()

    async def __anext__(self) -> RequestDelta:
        while not self._deltas:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._deltas.popleft()


class Client:
    """Submits requests to an engine that runs in a thread of its own.

    All methods but `close` return at once and belong to the event loop's thread; the engine belongs
    to its thread. The two meet in the inbox (loop to engine) and `_deliver` (engine to loop, one
    call a step).
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, model_name: str, backend_name: str
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.backend_name = backend_name
        self.max_model_len = engine.intake.limits.max_model_len
        self.error: str | None = None
        self._streams: dict[str, RequestStream] = {}
        self._inbox: deque[Request | tuple[str, int | None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._refusing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="halyard-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self.error is None and self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Requests without a final answer yet."""
        return len(self._streams)

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what `submit` would otherwise compile on the event loop.

        Raises:
            RequestError: the constraint is malformed, impossible or too complex.
        """
        if params.guided is not None:
            await asyncio.to_thread(self.engine.intake.guidance, params)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "default",
        share: float = 1.0,
    ) -> RequestStream:
        """Queue a request.

        Raises:
            RequestError, ContextLengthError: the request is invalid.
            QueueFullError: too many requests wait; try again after `retry_after` seconds.
            EngineDeadError: the engine has failed or is shutting down.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        if self._refusing:
            raise EngineDeadError(SHUTTING_DOWN)
        request = self.engine.intake.request(
            prompt_token_ids,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            share=share,
        )
        if request.request_id in self._streams:
            raise HalyardError(f"request id {request.request_id} is in use")
        self._check_queue()
        self._loop = asyncio.get_running_loop()
        stream = RequestStream(request, Answers(request, self._decoder(params)), self._abort)
        self._streams[request.request_id] = stream
        self._send(request)
        return stream

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for a while, answer the rest, stop."""
        self._refusing = True
        deadline = time.monotonic() + drain_seconds
        while self._streams and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for stream in list(self._streams.values()):
            self._send((stream.request_id, None))
        self._fail_streams(SHUTTING_DOWN)
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def _decoder(self, params: SamplingParams) -> Callable[[], IncrementalDecoder] | None:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return None
        return lambda: tokenizer.detokenizer(params.skip_special_tokens)

    # -- event loop side ----------------------------------------------------------------------

    def _check_queue(self) -> None:
        limit = self.engine.max_queue_len
        waiting = self.engine.num_waiting + len(self._inbox)
        if limit is not None and waiting >= limit:
            raise QueueFullError(
                f"{waiting} requests are waiting already, the limit is {limit}: try again later",
                retry_after=self.engine.metrics.estimated_wait_seconds(waiting),
            )

    def _send(self, message: Request | tuple[str, int | None]) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _abort(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._send((request_id, None))
            self.engine.metrics.observe_cancelled(request_id, stream.request.tenant)

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Hand one step's events to their streams."""
        by_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        delivered: list[tuple[Request, RequestDelta]] = []
        for request_id, own in by_request.items():
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # cancelled while the step ran
            delta = stream.answers.feed(own)
            for index in stream.answers.abandoned:
                self._send((request_id, index))
            stream.answers.abandoned.clear()
            if delta is not None:
                delivered.append((stream.request, delta))
                if delta.finished:
                    del self._streams[request_id]
                stream.put(delta)
        self.engine.metrics.observe_deltas(delivered)

    def _fail_streams(self, reason: str) -> None:
        """Every request gets an answer, if only an error."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            request = stream.request
            stream.put(
                RequestDelta(
                    request_id=request.request_id,
                    completions=tuple(
                        CompletionDelta(index, "", (), finish_reason="error", error=reason)
                        for index in stream.answers.unfinished
                    ),
                    num_prompt_tokens=len(request.prompt_token_ids),
                    finished=True,
                )
            )

    def _die(self, reason: str) -> None:
        self.error = reason
        self._fail_streams(reason)

    # -- engine side --------------------------------------------------------------------------

    def _run(self) -> None:
        """The step loop. An exception here is a bug or a device failure: nothing can go on."""
        try:
            while True:
                self._drain_inbox()
                if self.engine.has_work():
                    self._publish(self.engine.step())
                elif self._stopping:
                    return
                else:
                    self._wake.wait()
                    self._wake.clear()
        except Exception as error:
            logger.exception("the engine stopped")
            reason = f"the engine stopped: {type(error).__name__}: {error}"
            if self._loop is None or self._loop.is_closed():
                self.error = reason
            else:
                self._loop.call_soon_threadsafe(self._die, reason)
        finally:
            self.engine.close()

    def _drain_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self.engine.add(message)
            else:
                self.engine.abort(*message)

    def _publish(self, events: list[TokenEvent]) -> None:
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)
