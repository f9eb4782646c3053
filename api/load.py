"""A client that loads a server over HTTP, open- or closed-loop, and times every token.

It speaks just enough HTTP/1.1 for streamed completions, by itself: a general client costs several
times as much a token, and at hundreds of streams that would be what is measured.
"""

from __future__ import annotations

import asyncio
import random
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
    path = parts.path.rstrip("/")
    # Written before the clock runs: hundreds at once would wait for this process, not for the server.
    written = [_written(address, path, model, one, key, token_ids) for one in requests]
    gate = asyncio.Semaphore(concurrency or len(requests))
    arrivals = random.Random(seed)
    began = time.perf_counter()

    async def one(request: bytes, due: float) -> Timing:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        # Closed loop: a request begins when it is its turn. Open loop: when it is due.
        async with gate:
            timing = Timing(time.perf_counter())
            try:
                await _stream(address, request, timing)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                timing.error = f"{type(error).__name__}: {error}"
            timing.ended = time.perf_counter()
            return timing

    due, tasks = 0.0, []
    for request in written:
        tasks.append(asyncio.create_task(one(request, due)))
        due += arrivals.expovariate(rate) if rate else 0.0
    timings = await asyncio.gather(*tasks)
    return LoadRun(rate, concurrency, time.perf_counter() - began, tuple(timings))


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


async def _stream(address: tuple[str, int], request: bytes, timing: Timing) -> None:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = head.split(" ", 2)[1]
        stream = StreamReader("transfer-encoding: chunked" in head)
        if status != "200":
            parts = []
            while piece := await reader.read(1 << 16):
                parts += stream.feed(piece)
            text = b"".join([*parts, stream.rest])
            raise ValueError(f"status {status}: {text[:300].decode(errors='replace')}")
        while not stream.ended and (piece := await reader.read(1 << 16)):
            now = time.perf_counter()
            for event in stream.feed(piece):
                _take(event, now, timing)
        if not timing.done:
            raise ValueError("the answer broke off")
    finally:
        writer.close()


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
