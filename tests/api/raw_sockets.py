"""A client that sends bytes, whatever they are."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from typing import Any

from served import Served

from halyard.api.connections import ConnectionLimits

QUICK = ConnectionLimits(
    head_seconds=1.0, body_seconds=0.6, body_bytes_per_second=1000, stall_seconds=0.4,
    max_connections=8,
)  # fmt: skip


def connect(served: Served, receive: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive is not None:  # before it is connected, or the window is agreed on already
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    made.settimeout(5)
    made.connect(("127.0.0.1", served.port))
    return made


def read_all(sock: socket.socket) -> bytes:
    told = b""
    while True:
        try:
            piece = sock.recv(65536)
        except ConnectionResetError:
            return told
        if not piece:
            return told
        told += piece


def read_until(sock: socket.socket, end: bytes) -> None:
    """However many pieces an answer comes in."""
    told = b""
    while end not in told:
        piece = sock.recv(4096)
        assert piece, f"the connection ended: {told!r}"
        told += piece


def drip(sock: socket.socket, piece: bytes, seconds: float = 3.0) -> float:
    """Send it again and again until the other end has had enough; for how long that went on."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        try:
            sock.sendall(piece)
            time.sleep(0.05)
            sock.setblocking(False)
            try:
                if sock.recv(4096) == b"":
                    break
            except BlockingIOError:
                pass
            finally:
                sock.settimeout(5)
        except (ConnectionError, TimeoutError):
            break
    return time.monotonic() - started


def ask(served: Served, request: bytes) -> bytes:
    """The answer to raw bytes; the connection is closed after it."""
    with closing(connect(served)) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def completion(prompt: str, head: bytes = b"", **more: Any) -> bytes:
    asked = {"model": "letters", "prompt": prompt, "max_tokens": 2, **more}
    body = json.dumps(asked).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head +
        b"content-length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip


LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def told_for(served: Served, *pieces: bytes) -> bytes:
    """All that is answered, to its end, to bytes that come in pieces."""
    with closing(connect(served)) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.1)
        return read_all(sock)
