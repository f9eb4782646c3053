"""What an engine's process says is read less often while the event loop is busy: with that, or with requests."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from halyard.runtime import process_port
from halyard.runtime.client import Client, RequestStream
from halyard.runtime.config import EngineConfig
from halyard.runtime.intake import Limits
from halyard.runtime.messages import Channel, Ready, Step
from halyard.runtime.plan import TokenEvent
from halyard.runtime.port import EngineFacts
from halyard.runtime.process_port import ProcessPort
from halyard.runtime.request import SamplingParams

FACTS = EngineFacts("model", "null", Limits(2048, 1024, frozenset(), 64))
GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


class Engine:
    """An engine's process, played by the test. A delivery takes the port's owner `cost` seconds."""

    def __init__(self, hang_seconds: float | None) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=-1)
        self.channel = Channel(theirs)
        config = EngineConfig.create(model="embedded", backend="null")
        ready = Ready(FACTS, cast("Any", None))
        self.port = ProcessPort(config, self.process, Channel(ours), ready, hang_seconds, None)
        self.cost = 0.0
        self.deliveries: list[int] = []  # events in each
        self.died: list[str] = []
        self.client = Client(self.port, None)
        self.client.start(self.died.append)
        deliver = self.port._deliver

        def dear(events: list[TokenEvent]) -> None:
            self.deliveries.append(len(events))
            deliver(events)
            time.sleep(self.cost)

        self.port._deliver = dear

    def say(self, *events: TokenEvent, busy: bool = True) -> None:
        self.channel.send(Step(list(events), 0, self.port._sent, busy))

    def end(self) -> None:
        """As a process that is killed: its end of the socket goes with it."""
        self.process.kill()
        self.channel.socket.close()


@asynccontextmanager
async def engine(hang_seconds: float | None = None) -> AsyncIterator[Engine]:
    played = Engine(hang_seconds)
    try:
        async with asyncio.timeout(20):
            yield played
            played.process.kill()
            await played.client.close(0.0)
    finally:
        played.end()


@pytest.fixture
def long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader rests for 0.1 s after a delivery that took 10 ms; requests alone make it rest never."""
    monkeypatch.setattr(process_port, "_ARRIVAL_SECONDS", 0.0)
    monkeypatch.setattr(process_port, "_REST", 10.0)
    monkeypatch.setattr(process_port, "_MAX_REST_SECONDS", 0.1)


def token(stream: RequestStream, value: int, **more: Any) -> TokenEvent:
    return TokenEvent(stream.request_id, 0, (value,), **more)


async def tokens(stream: RequestStream) -> tuple[list[int], str | None]:
    got: list[int] = []
    async for delta in stream:
        got += delta.completions[0].token_ids
    return got, delta.completions[0].error


async def resting(played: Engine) -> None:
    while played.port._rest is None:
        await asyncio.sleep(0.001)


async def rest_behind_a_token(played: Engine) -> RequestStream:
    """A stream whose first token, 1, was dear to hand out."""
    stream = played.client.submit([7], GREEDY)
    played.cost = 0.01
    played.say(token(stream, 1))
    await resting(played)
    return stream


@pytest.mark.usefixtures("long_rests")
def test_steps_join_behind_a_dear_delivery_and_none_is_lost() -> None:
    async def scene() -> None:
        async with engine() as played:
            one, other = (played.client.submit([7], GREEDY) for _ in range(2))
            left = played.client.submit([7], GREEDY)
            reading = asyncio.gather(tokens(one), tokens(other))
            played.cost = 0.01
            played.say(token(one, 1), token(other, 11))
            await resting(played)
            played.say(token(one, 2), token(other, 12), token(left, 21))
            played.say(token(one, 3), token(other, 13, finish_reason="length"), token(left, 22))
            left.cancel()
            played.say(token(one, 4, finish_reason="length"), token(left, 23), busy=False)
            assert await reading == [([1, 2, 3, 4], None), ([11, 12, 13], None)]
            assert played.deliveries[0] == 2
            assert len(played.deliveries) == 2
            assert played.client.num_requests == 0

    asyncio.run(scene())


@pytest.mark.usefixtures("long_rests")
def test_a_cheap_delivery_is_followed_by_the_next_at_once() -> None:
    async def scene() -> None:
        async with engine() as played:
            stream = played.client.submit([7], GREEDY)
            for value in range(5):
                started = time.monotonic()
                played.say(token(stream, value))
                assert (await anext(stream)).completions[0].token_ids == (value,)
                assert time.monotonic() - started < 0.1
            assert len(played.deliveries) == 5

    asyncio.run(scene())


@pytest.mark.usefixtures("long_rests")
def test_steps_join_behind_requests_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_port, "_ARRIVAL_SECONDS", 0.002)

    async def scene() -> None:
        async with engine() as played:
            streams = [played.client.submit([7], GREEDY) for _ in range(8)]
            played.say(token(streams[0], 1))
            await resting(played)
            played.say(token(streams[0], 2))
            played.say(token(streams[0], 3, finish_reason="length"))
            assert await tokens(streams[0]) == ([1, 2, 3], None)
            assert len(played.deliveries) == 2

    asyncio.run(scene())


@pytest.mark.usefixtures("long_rests")
def test_an_engine_that_dies_meanwhile_is_found_and_what_it_said_counts() -> None:
    async def scene() -> None:
        async with engine() as played:
            stream = await rest_behind_a_token(played)
            played.say(token(stream, 2))
            played.end()
            got, error = await tokens(stream)
            assert got == [1, 2]
            assert "SIGKILL" in (error or "")
            assert len(played.died) == 1

    asyncio.run(scene())


def test_what_is_not_read_is_no_hang_and_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_port, "_REST", 100.0)
    monkeypatch.setattr(process_port, "_MAX_REST_SECONDS", 0.5)

    async def scene() -> None:
        async with engine(hang_seconds=0.1) as played:  # five looks take 0.125 s
            stream = played.client.submit([7], GREEDY)
            reading = asyncio.create_task(tokens(stream))
            played.cost = 0.01
            for value in range(2):
                played.say(token(stream, value))
                await resting(played)
                await asyncio.sleep(0.3)
                assert played.process.poll() is None
                while played.port._rest is not None:
                    await asyncio.sleep(0.01)
            while played.process.poll() is None:
                await asyncio.sleep(0.01)
            played.end()
            got, error = await reading
            assert got == [0, 1]
            assert "hung" in (error or "")

    asyncio.run(scene())


@pytest.mark.usefixtures("long_rests")
def test_closing_meanwhile_ends_the_rest() -> None:
    async def scene() -> None:
        async with engine() as played:
            stream = await rest_behind_a_token(played)
            played.process.kill()
            await played.client.close(0.0)
            assert "shut" in ((await tokens(stream))[1] or "")
            await asyncio.sleep(0.15)  # the reader would have come back: of a closed socket

    asyncio.run(scene())
