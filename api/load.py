"""A client that loads a server over HTTP, open- or closed-loop, and times every token.

It speaks just enough HTTP/1.1 for streamed completions, by itself: a general client costs several
times as much a token, and at hundreds of streams that would be what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from halyard.api.stream_reader import StreamReader
from halyard.hal.errors import ConfigError
from halyard.runtime.latency import percentiles
from halyard.runtime.workloads import WorkloadRequest

__all__ = ["Goal", "LoadRun", "Timing", "run_load", "summary"]

_Address = tuple[Any, ...]  # as getaddrinfo gives it
_CONNECT_SECONDS = 5.0  # that one of a server's addresses has to answer
_NEXT_SECONDS = 0.25  # until the next of them is tried beside the one before


@dataclass(frozen=True, slots=True)
class Goal:
    """What counts as served well: both bounds in seconds, None: any."""

    ttft: float | None = None  # to the first token
    tpot: float | None = None  # mean between tokens of an answer


@dataclass(slots=True)
class Timing:
    """One request, on the client's clock."""

    started: float
    tokens: list[float] = field(default_factory=list)  # when each arrived
    num_tokens: int = 0  # as the server counts them; chunks may hold several
    ended: float = 0.0
    error: str | None = None
    done: bool = False  # its stream came to its end

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.started

    @property
    def tpot(self) -> float | None:
        if self.num_tokens < 2:
            return None
        return (self.tokens[-1] - self.tokens[0]) / (self.num_tokens - 1)

    def meets(self, goal: Goal) -> bool:
        if self.error is not None or not self.tokens:
            return False
        slow = goal.tpot is not None and self.tpot is not None and self.tpot > goal.tpot
        return not slow and (goal.ttft is None or self.ttft <= goal.ttft)


@dataclass(frozen=True, slots=True)
class LoadRun:
    """All requests of one rate or concurrency."""

    rate: float | None  # requests a second, arriving at random; None: closed loop
    concurrency: int | None  # requests at once; None: as many as there are
    seconds: float
    timings: tuple[Timing, ...]
    client_busy: float = 0.0  # part of the time that this client worked; near 1: it is too slow


async def run_load(
    url: str,
    model: str,
    requests: Sequence[WorkloadRequest],
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    key: str | None = None,
    seed: int = 0,
    token_ids: bool = False,
) -> LoadRun:
    """Send all requests: at `rate` a second (Poisson), or `concurrency` at once, or all at once.

    Args:
        token_ids: ask for these too, so that a token counts when it comes, whether or not it is text.

    Raises:
        ConfigError: the address is none that this client can speak to.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"the load client speaks http:// only, got {url!r}")
    address = (parts.hostname, parts.port or 80)
    try:
        family, peer = await _reachable(*address)
    except OSError as error:
        raise ConfigError(f"the address of {url!r} can't be found: {error}") from None
    path = parts.path.rstrip("/")
    # Written before the clock runs: hundreds at once would wait for this process, not for the server.
    written = [_written(address, path, model, one, key, token_ids) for one in requests]
    gate = asyncio.Semaphore(concurrency or len(requests))
    arrivals = random.Random(seed)
    began, working = time.perf_counter(), time.process_time()

    async def one(request: bytes, due: float) -> Timing:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        # Closed loop: a request begins when it is its turn. Open loop: when it is due.
        async with gate:
            timing = Timing(time.perf_counter())
            try:
                await _stream(family, peer, request, timing)
            except (OSError, ValueError) as error:
                timing.error = f"{type(error).__name__}: {error}"
            timing.ended = time.perf_counter()
            return timing

    due, tasks = 0.0, []
    for request in written:
        tasks.append(asyncio.create_task(one(request, due)))
        due += arrivals.expovariate(rate) if rate else 0.0
    timings = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - began
    busy = (time.process_time() - working) / seconds
    return LoadRun(rate, concurrency, seconds, tuple(timings), busy)


async def _reachable(host: str, port: int) -> tuple[int, _Address]:
    """(family, address) of one of a host's addresses that takes connections; else of its first."""
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(
                host, port, happy_eyeballs_delay=_NEXT_SECONDS
            )
    except OSError:  # each request tells why
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return found[0][0], found[0][4]
    connection = writer.get_extra_info("socket")
    reached = connection.family, connection.getpeername()
    writer.close()
    return reached


def _written(
    address: tuple[str, int],
    path: str,
    model: str,
    request: WorkloadRequest,
    key: str | None,
    token_ids: bool,
) -> bytes:
    """The whole HTTP request."""
    body = msgspec.json.encode(
        {
            "model": model,
            "prompt": list(request.prompt_token_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"return_token_ids": True} if token_ids else {}),
        }
    )
    secret = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {path}/v1/completions HTTP/1.1\r\nhost: {address[0]}:{address[1]}\r\n"
        f"content-type: application/json\r\n{secret}content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


async def _stream(family: int, address: _Address, request: bytes, timing: Timing) -> None:
    """Raises OSError or ValueError if no whole answer comes."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.setblocking(False)
    answer = _Answer(timing, loop.create_future())
    try:
        sent = await _begin(loop, connection, address, request)
        transport, _ = await loop.create_connection(lambda: answer, sock=connection)
    except BaseException:
        connection.close()
        raise
    try:
        if sent < len(request):
            transport.write(request[sent:])
        await answer.ended
    finally:
        transport.close()


async def _begin(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, address: _Address, request: bytes
) -> int:
    """Connect; returns how much of the request is sent already."""
    with contextlib.suppress(BlockingIOError):
        connection.connect(address)
    # To a server on this machine the connection is made already: what is sent now goes ahead of what
    # hundreds of others do in the event loop to begin.
    try:
        return connection.send(request)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOTCONN):
            raise
    writable = asyncio.Event()
    loop.add_writer(connection, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(connection)
    if failed := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(failed, os.strerror(failed))
    return 0


class _Answer(asyncio.Protocol):
    """What comes back on one connection.

    Args:
        ended: gets a result when the answer is whole, or why it can't be.
    """

    def __init__(self, timing: Timing, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self._timing = timing
        self._head = b""
        self._status = ""
        self._reader: StreamReader | None = None
        self._refusal: list[bytes] = []  # of a body that is no stream

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.ended.done():
            return
        try:
            self._read(data, now)
        except ValueError as error:
            self.ended.set_exception(error)

    def _read(self, data: bytes, now: float) -> None:
        reader = self._reader
        if reader is None:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            told = head.decode("latin-1").lower()
            self._status = told.split(" ", 2)[1]
            reader = self._reader = StreamReader("transfer-encoding: chunked" in told)
        events = reader.feed(data)
        if self._status != "200":
            self._refusal += events
            return
        for event in events:
            _take(event, now, self._timing)
        if reader.ended:
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self._end(error)

    def _end(self, error: Exception | None = None) -> None:
        """Nothing more comes."""
        if error is None and self._timing.done:
            self.ended.set_result(None)
            return
        if error is None and self._reader is not None and self._status != "200":
            text = b"".join([*self._refusal, self._reader.rest])
            error = ValueError(f"status {self._status}: {text[:300].decode(errors='replace')}")
        self.ended.set_exception(error or ValueError("the answer broke off"))


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    """The little that is looked at."""

    choices: list[Any] | None = None
    usage: _Usage | None = None
    error: Any = None


_events = msgspec.json.Decoder(_Event)


def _take(data: bytes, now: float, timing: Timing) -> None:
    if data == b"[DONE]":
        timing.done = True
        return
    try:
        found = _events.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"an event can't be read: {error}") from None
    if found.error is not None:
        raise ValueError(str(found.error)[:300])
    if found.usage is not None:
        timing.num_tokens = found.usage.completion_tokens
    if found.choices:
        timing.tokens.append(now)
        if found.usage is None:
            timing.num_tokens = max(timing.num_tokens, len(timing.tokens))


def summary(run: LoadRun, goal: Goal) -> dict[str, Any]:
    """Rates and percentiles (seconds) of a run, as plain data."""
    good = [timing for timing in run.timings if timing.error is None and timing.tokens]
    gaps = [
        later - earlier
        for timing in good
        for earlier, later in zip(timing.tokens, timing.tokens[1:], strict=False)
    ]
    tokens = sum(timing.num_tokens for timing in good)
    events = sum(len(timing.tokens) for timing in good)
    met = sum(timing.meets(goal) for timing in run.timings)
    return {
        "rate": run.rate,
        "concurrency": run.concurrency,
        "requests": len(run.timings),
        "failed": len(run.timings) - len(good),
        "errors": sorted({t.error for t in run.timings if t.error is not None})[:3],
        "seconds": run.seconds,
        "client_busy": run.client_busy,
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / run.seconds,
        "tokens_per_event": tokens / events if events else None,
        "requests_per_second": len(good) / run.seconds,
        "goodput_requests_per_second": met / run.seconds,
        "goal": {"ttft": goal.ttft, "tpot": goal.tpot},
        "goal_met": met / max(1, len(run.timings)),
        "ttft": percentiles([timing.ttft for timing in good]),
        "tpot": percentiles([timing.tpot for timing in good if timing.tpot is not None]),
        "itl": percentiles(gaps),
        "e2e": percentiles([timing.ended - timing.started for timing in good]),
    }
