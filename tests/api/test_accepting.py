"""A burst of connections is taken in a few at a time, and none of it is turned away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from scripted_engine import ScriptedEngine

from halyard.api.server import _ACCEPTED_AT_ONCE, _WAITING_CONNECTIONS, _Server, bind

_LISTENER_QUEUE = 28  # where Linux' TCP_INFO has how many connections may wait
BURST = 12 * _ACCEPTED_AT_ONCE


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux tells how many may wait")
def test_a_burst_of_connections_is_taken_in_a_few_at_a_time() -> None:
    asyncio.run(_burst())


async def _burst() -> None:
    config = uvicorn.Config(_answer, lifespan="off", log_config=None)
    host: Any = ScriptedEngine()
    server = _Server(config, host, 0.0, print)
    config.load()
    server.lifespan = config.lifespan_class(config)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind("127.0.0.1", 0))
        await server.startup([listener])
        told = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LISTENER_QUEUE + 4)
        most = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert struct.unpack_from("I", told, _LISTENER_QUEUE)[0] == min(_WAITING_CONNECTIONS, most)
        clients = [
            stack.enter_context(socket.create_connection(listener.getsockname()))
            for _ in range(BURST)
        ]
        clients[0].sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        clients[0].setblocking(False)
        answer, taken = b"", [0]
        while b"here" not in answer:  # the first one's request waits for few of the others
            await asyncio.sleep(0)
            taken.append(len(server.server_state.connections))
            with contextlib.suppress(BlockingIOError):
                answer += clients[0].recv(4096)
        assert taken[-1] < BURST
        for _ in range(BURST):
            await asyncio.sleep(0)
            taken.append(len(server.server_state.connections))
        assert taken[-1] >= BURST - 1  # the first has gone again
        more = max(later - sooner for sooner, later in pairwise(taken))
        assert more <= _ACCEPTED_AT_ONCE + 1  # asyncio takes one more, since Python 3.12
        for one in server.servers:
            one.close()
