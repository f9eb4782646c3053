"""The asyncio side of an engine: one stream a request, whatever thread or process the steps run in. No torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Unpack

from halyard import __version__
from halyard.hal.errors import EngineDeadError, HalyardError, QueueFullError
from halyard.runtime.answer import Answers
from halyard.runtime.outputs import CompletionDelta, RequestDelta, merge
from halyard.runtime.plan import TokenEvent
from halyard.runtime.request import Pooling, Request, RequestOptions, SamplingParams

if TYPE_CHECKING:
    from halyard.models.tokenizer import Tokenizer
    from halyard.runtime.engine import EngineStats
    from halyard.runtime.intake import Limits
    from halyard.runtime.metrics import Metrics
    from halyard.runtime.picture import EnginePicture
    from halyard.runtime.port import EnginePort

__all__ = ["Client", "RequestStream"]

logger = logging.getLogger("halyard.engine")

MAX_PENDING = 2048  # steps that the reader of a stream may be behind
MAX_MERGED = MAX_PENDING  # of them come as one
READS_TOO_SLOWLY = "the answer was cut off: it was read too slowly"
UNKNOWN = f"halyard-{__version__}"  # the fingerprint of an engine whose files nobody digested
SHUTTING_DOWN = "the server is shutting down"


class RequestStream(AsyncIterator[RequestDelta]):
    """The answers of one request as they come. Belongs to one event loop."""

    def __init__(
        self, request: Request, answers: Answers, leave: Callable[[str, RequestDelta | None], None]
    ) -> None:
        self.request = request
        self.answers = answers
        self._leave = leave  # is told of an end from this side, and what it was; None: cancelled
        self._deltas: list[RequestDelta] = []  # not read yet
        self._waiter: asyncio.Future[None] | None = None  # of the reader, if it waits
        self._closed = False  # no delta comes after those in the queue
        self.begun = False  # something has come
        self.given_up = False  # its engine is gone, or goes: the error is not this request's

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def cancel(self) -> None:
        """Give the request up: its blocks are freed at the next step. Idempotent."""
        if not self._closed:
            self._closed = True
            self._deltas.clear()
            self._wake()
            self._leave(self.request_id, None)

    def cut(self, reason: str) -> None:
        """End it here: what has been generated is the answer, its blocks are freed. Idempotent."""
        if self._closed:
            return
        delta = self.answers.feed(
            [
                TokenEvent(self.request_id, index, finish_reason="length", stop_reason=reason)
                for index in self.answers.unfinished
            ]
        )
        self._leave(self.request_id, delta)
        if delta is not None:
            self._deltas.append(delta)
        self._closed = True
        self._wake()

    def put(self, delta: RequestDelta) -> None:
        if len(self._deltas) >= MAX_PENDING:
            self._overflow()
        self.begun = True
        if not self._closed:
            self._deltas.append(delta)
            self._closed = delta.finished
            self._wake()

    def _overflow(self) -> None:
        """Nobody takes what comes: stop making more, and keep no more than a word about it."""
        logger.warning(
            "request %s of tenant %s was cut off: its reader is %d steps behind",
            self.request_id, self.request.tenant, len(self._deltas),
        )  # fmt: skip
        self._deltas.clear()
        self._leave(self.request_id, None)
        failed = (
            CompletionDelta(index, "", (), finish_reason="error", error=READS_TOO_SLOWLY)
            for index in self.answers.unfinished
        )
        prompt_len = len(self.request.prompt_token_ids)
        self._deltas.append(RequestDelta(self.request_id, tuple(failed), prompt_len, finished=True))
        self._closed = True
        self._wake()

    async def __anext__(self) -> RequestDelta:
        deltas = self._deltas
        while not deltas:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        if len(deltas) == 1:
            return deltas.pop()
        # Its reader was late: what is there comes as one, but an error after what was before it.
        most = min(len(deltas), MAX_MERGED)
        end = next((at for at in range(most) if deltas[at].failed), most) or 1
        merged = merge(deltas[:end])
        del deltas[:end]
        return merged

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Client:
    """Submits requests to one engine and hands its answers out.

    All methods but `close` return at once and belong to the event loop's thread.
    """

    def __init__(
        self, port: EnginePort, tokenizer: Tokenizer | None, fingerprint: str = UNKNOWN
    ) -> None:
        self.port = port
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint  # of all that decides its answers
        self.model_name = port.facts.model_name
        self.backend_name = port.facts.backend_name
        self.max_model_len = port.facts.limits.max_model_len
        self.hidden_size = port.facts.limits.hidden_size
        self.error: str | None = None
        self._streams: dict[str, RequestStream] = {}
        self._refusing = False
        self._started = False
        self._on_death: Callable[[str], None] | None = None

    def start(self, on_death: Callable[[str], None] | None = None) -> None:
        """Bind it to the running event loop; the first request does that too.

        Args:
            on_death: is called with the reason when the engine has failed.
        """
        self._on_death = on_death or self._on_death
        if not self._started:
            self._started = True
            self.port.start(self._deliver, self._die)

    @property
    def alive(self) -> bool:
        return self.error is None and self.port.alive

    @property
    def num_requests(self) -> int:
        """Requests without a final answer yet."""
        return len(self._streams)

    @property
    def limits(self) -> Limits:
        return self.port.facts.limits

    @property
    def metrics(self) -> Metrics:
        return self.port.metrics

    def stats(self) -> EngineStats:
        return self.port.stats()

    async def picture(self) -> EnginePicture:
        """The engine's blocks and sequences.

        Raises:
            EngineDeadError: the engine is dead, or dies meanwhile.
        """
        self.start()
        return await self.port.picture()

    async def prepare(self, params: SamplingParams) -> None:
        """Compile what `submit` would otherwise compile on the event loop.

        Raises:
            RequestError: the constraint is malformed, impossible or too complex.
        """
        if params.guided is not None:
            self.start()
            await self.port.prepare(params)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> RequestStream:
        """Queue a request.

        Raises:
            RequestError, ContextLengthError: the request is invalid.
            QueueFullError: too many requests wait; try again after `retry_after` seconds.
            EngineDeadError: the engine has failed or is shutting down.
        """
        self._check_alive()
        return self._queue(self.port.intake.request(prompt_token_ids, params, **options))

    def check_input(self, prompt_token_ids: Sequence[int]) -> None:
        """Raise RequestError or ContextLengthError if `embed` would refuse it."""
        self.port.intake.checked_prompt(prompt_token_ids, 0, "input")

    def embed(
        self,
        prompt_token_ids: Sequence[int],
        pooling: Pooling,
        **options: Unpack[RequestOptions],
    ) -> RequestStream:
        """Queue a request for an embedding: its stream holds one delta. Errors as `submit`'s."""
        self._check_alive()
        return self._queue(self.port.intake.pooled_request(prompt_token_ids, pooling, **options))

    def give_up(self, reason: str) -> None:
        """End all requests with an error."""
        for stream in list(self._streams.values()):
            self.port.abort(stream.request_id)
        if self._streams:
            logger.warning("%s; requests that ended with an error: %d", reason, len(self._streams))
        self._fail_streams(reason)

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for a while, answer the rest, stop."""
        self._refusing = True
        deadline = time.monotonic() + drain_seconds
        while self._streams and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.give_up(SHUTTING_DOWN)
        await self.port.close()

    def _check_alive(self) -> None:
        if self.error is not None:
            raise EngineDeadError(self.error)
        if self._refusing:
            raise EngineDeadError(SHUTTING_DOWN)
        if not self.port.alive:  # it has failed, and says so presently
            raise EngineDeadError("the engine has stopped")

    def _queue(self, request: Request) -> RequestStream:
        if request.request_id in self._streams:
            raise HalyardError(f"request id {request.request_id} is in use")
        self._check_queue(request.tenant)
        self.start()
        stream = RequestStream(request, Answers.of(request, self.tokenizer), self._abort)
        self._streams[request.request_id] = stream
        self.port.add(request)
        return stream

    def _check_queue(self, tenant: str) -> None:
        """A full queue still takes a tenant whose part of it is less than even.

        So nobody is locked out by others; T tenants fill it to 1 + 1/2 + ... + 1/T of its length.
        """
        limit = self.port.facts.max_queue_len
        waiting = self.port.num_waiting
        if limit is None or waiting < limit:
            return
        parts = Counter(s.request.tenant for s in self._streams.values() if not s.begun)
        parts.setdefault(tenant, 0)
        own = parts[tenant] if len(parts) > 1 else waiting
        if own * len(parts) >= limit:
            raise QueueFullError(
                f"{waiting} requests are waiting already, the limit is {limit}: try again later",
                retry_after=self.metrics.estimated_wait_seconds(own * len(parts)),
            )

    def _abort(self, request_id: str, last: RequestDelta | None) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        self.port.abort(request_id)
        if last is None:
            self.metrics.observe_cancelled(stream.request)
        else:
            self.metrics.observe_deltas([(stream.request, last)])

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Hand the events of a step, or of a few, to their streams."""
        by_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        delivered: list[tuple[RequestStream, RequestDelta]] = []
        for request_id, own in by_request.items():
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # cancelled while the step ran
            delta = stream.answers.feed(own)
            for index in stream.answers.take_abandoned():
                self.port.abort(request_id, index)
            if delta is not None:
                delivered.append((stream, delta))
                if delta.finished:
                    del self._streams[request_id]
        # Counted before they are handed out: a stream that overflows ends its request.
        self.metrics.observe_deltas((stream.request, delta) for stream, delta in delivered)
        for stream, delta in delivered:
            stream.put(delta)

    def _fail_streams(self, reason: str) -> None:
        """Every request gets an answer, if only an error."""
        streams, self._streams = self._streams, {}
        delivered: list[tuple[Request, RequestDelta]] = []
        for stream in streams.values():
            request = stream.request
            delta = RequestDelta(
                request_id=request.request_id,
                completions=tuple(
                    CompletionDelta(index, "", (), finish_reason="error", error=reason)
                    for index in stream.answers.unfinished
                ),
                num_prompt_tokens=len(request.prompt_token_ids),
                finished=True,
            )
            delivered.append((request, delta))
            stream.given_up = True
            stream.put(delta)
        self.metrics.observe_deltas(delivered)

    def _die(self, reason: str) -> None:
        self.error = reason
        logger.error("%s; requests that ended with an error: %d", reason, len(self._streams))
        self._fail_streams(reason)
        if self._on_death is not None:
            self._on_death(reason)
