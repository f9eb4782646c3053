"""Work for a client that may go away: it is ended then, and nothing of that is seen outside."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from halyard.api.sse import EventStream


class Client:
    """An ASGI connection: what was sent, and when it leaves."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.left = asyncio.Event()
        self.cancelled = 0

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message.get("body", b"head"))

    def cancel(self) -> None:
        self.cancelled += 1

    async def serve(self, events: Any) -> None:
        stream = EventStream(events, self.cancel, lambda error: None)
        await stream(Any, self.receive, self.send)  # type: ignore[arg-type]


class Events:
    """One event, then none for ever, or until somebody lets it end."""

    def __init__(self) -> None:
        self.ending = asyncio.Event()
        self.ended = ""

    async def __call__(self) -> Any:
        try:
            yield b"one"
            await self.ending.wait()
            yield b"two"
            self.ended = "whole"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            await asyncio.sleep(0.01)  # what it cleans up is waited for
            self.ended = "cleaned up"
            raise


async def until_first(client: Client) -> None:
    while b"one" not in client.sent:
        await asyncio.sleep(0)


def test_a_whole_answer() -> None:
    async def scene() -> None:
        client, events = Client(), Events()
        events.ending.set()
        await client.serve(events())
        assert client.sent == [b"head", b"one", b"two", b""]
        assert client.cancelled == 1
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1  # nobody watches any more

    asyncio.run(scene())


def test_whoever_leaves_ends_the_work_and_the_task_goes_on() -> None:
    async def scene() -> None:
        client, events = Client(), Events()
        serving = asyncio.create_task(client.serve(events()))
        await until_first(client)
        client.left.set()
        await serving  # not cancelled: that is how it ends
        assert serving.cancelling() == 0
        assert events.ended == "cleaned up"
        assert client.sent == [b"head", b"one"]
        assert client.cancelled == 1

    asyncio.run(scene())


@pytest.mark.parametrize("left", [False, True])
def test_a_server_that_stops_ends_the_task_also_when_the_client_leaves_meanwhile(
    left: bool,
) -> None:
    async def scene() -> None:
        client, events = Client(), Events()
        serving = asyncio.create_task(client.serve(events()))
        await until_first(client)
        if left:
            client.left.set()
            await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert events.ended == "cleaned up"
        assert client.cancelled == 1

    asyncio.run(scene())


def test_leaving_at_the_very_end_spoils_nothing() -> None:
    """Whatever comes first, the work's end or the cancelling: the task goes on."""

    async def scene(turns: int) -> None:
        client, events = Client(), Events()
        serving = asyncio.create_task(client.serve(events()))
        await until_first(client)
        events.ending.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        client.left.set()
        await serving
        assert client.cancelled == 1
        assert serving.cancelling() == 0

    for turns in range(4):
        asyncio.run(scene(turns))
