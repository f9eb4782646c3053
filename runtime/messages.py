"""What an engine process and its owner say to each other, and how it is put on a socket. No torch.

A frame is its length (4 bytes, little-endian), one byte that says how it is encoded, and the message.
Steps are the traffic: msgpack with known types, plain tokens as columns, one frame a step. All else is pickled, so a new kind
of message needs a class and nothing more. Both ends are the same program of the same version.
"""

from __future__ import annotations

import pickle
import select
import socket
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from halyard.runtime.config import EngineConfig
from halyard.runtime.plan import TokenEvent
from halyard.runtime.port import EngineFacts
from halyard.runtime.request import Request
from halyard.runtime.token_columns import TokenColumns

if TYPE_CHECKING:
    from halyard.runtime.engine import EngineStats

__all__ = [
    "Abort",
    "Add",
    "Call",
    "Channel",
    "Failed",
    "LogLine",
    "Phase",
    "Ready",
    "Reply",
    "Start",
    "Step",
    "Stop",
    "encode",
]

_HEADER = struct.Struct("<IB")
_PICKLE, _STEP = 0, 1
_RECEIVE = 1 << 20  # bytes read at once


@dataclass(frozen=True, slots=True)
class Start:
    """The first message: what to build."""

    config: EngineConfig
    log_level: int


class Add(NamedTuple):
    """A request; its constraint, if any, is compiled by the engine."""

    request: Request


class Abort(NamedTuple):
    """Give up a request, or one of its answers."""

    request_id: str
    answer: int | None


class Call(NamedTuple):
    """Anything that is answered by a `Reply` of that number."""

    number: int
    name: str
    arguments: tuple[Any, ...] = ()


class Stop(NamedTuple):
    """End, at the latest when the step that runs is done."""


class Phase(NamedTuple):
    """Loading has come that far."""

    name: str


class Ready(NamedTuple):
    """Loading is done."""

    facts: EngineFacts
    stats: EngineStats


class Failed(NamedTuple):
    """Loading failed, or a step did; the process ends."""

    error: Exception


class Reply(NamedTuple):
    """What a `Call` came to."""

    number: int
    value: Any
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class LogLine:
    """A log record, for the owner's handlers."""

    name: str
    level: int
    text: str


class Step(msgspec.Struct, array_like=True, gc=False):
    """What one step brought, and how the engine stands after it."""

    events: list[TokenEvent]  # that say more than a token; they come after `tokens`
    num_waiting: int
    num_received: int  # messages taken in so far
    busy: bool  # there is more to do
    observations: bytes = b""  # pickled list of (method of Metrics, arguments)
    stats: bytes = b""  # pickled EngineStats; empty: not this time
    tokens: TokenColumns = msgspec.field(default_factory=TokenColumns)


_step_encoder = msgspec.msgpack.Encoder()
_step_decoder = msgspec.msgpack.Decoder(Step)


def encode(message: Any) -> bytes:
    """A message as a frame."""
    if isinstance(message, Step):
        kind, body = _STEP, _step_encoder.encode(message)
    else:
        kind, body = _PICKLE, pickle.dumps(message, protocol=5)
    return _HEADER.pack(len(body), kind) + body


class Channel:
    """One end of the socket. `send` may be called from several threads, `receive` from one."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)

    def send(self, message: Any) -> None:
        """Send all of it, however long the other end takes to read.

        Raises:
            OSError: the other end is gone.
        """
        frame = encode(message)
        with self._lock:
            self.socket.sendall(frame)

    def wait(self, seconds: float) -> bool:
        """Whether something has come in by then, or the other end is gone: `receive` won't wait."""
        return bool(self._poll.poll(1e3 * seconds))

    def receive(self, *, wait: bool) -> list[Any]:
        """The messages that are complete, in order; with `wait` at least one.

        Raises:
            EOFError: the other end is gone, and all that it sent was received.
        """
        while True:
            try:
                data = self.socket.recv(_RECEIVE, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return []
            except ConnectionError:
                data = b""
            if not data:
                raise EOFError("the other process is gone")
            self._buffer += data
            messages = self._complete()
            if messages or not wait:
                return messages

    def _complete(self) -> list[Any]:
        messages: list[Any] = []
        buffer, position = self._buffer, 0
        with memoryview(buffer) as view:
            while len(buffer) - position >= _HEADER.size:
                length, kind = _HEADER.unpack_from(view, position)
                end = position + _HEADER.size + length
                if len(buffer) < end:
                    break
                with view[position + _HEADER.size : end] as body:
                    decode = _step_decoder.decode if kind == _STEP else pickle.loads
                    messages.append(decode(body))
                position = end
        del buffer[:position]
        return messages
