"""The engine process's loop: what it does while nobody asks anything."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from halyard.runtime import engine_process
from halyard.runtime.engine_process import EngineLoop
from halyard.runtime.messages import Add, Call, Channel, Reply, Stop
from halyard.runtime.request import Request, SamplingParams


class _Engine:
    """Work in three steps a request; pieces to rehearse, which it notes the times of."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.left = 0
        self.asleep = False
        self.num_waiting = 0
        self.done: list[str] = []
        self.rehearsed = threading.Event()
        self.during: Callable[[Callable[[], None]], None] = lambda meanwhile: meanwhile()

    def has_work(self) -> bool:
        return self.left > 0

    def add(self, request: Any) -> None:
        self.left = 3
        self.done.append(f"add {request.request_id}")

    def step(self, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        self.left -= 1
        if meanwhile is not None:
            self.during(meanwhile)
        self.done.append("step")
        time.sleep(0.002)
        return []

    def rehearse(self) -> bool:
        assert not self.has_work()
        if not self.pieces:
            self.rehearsed.set()
            return False
        self.pieces -= 1
        self.done.append("piece")
        time.sleep(0.002)
        return True

    def picture(self) -> str:
        return "a picture"

    def stats(self) -> None:
        return None


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(engine_process, "_QUIET_SECONDS", 0.1)
    ends = socket.socketpair()
    engine, owner = _Engine(pieces=5), Channel(ends[0])
    built = SimpleNamespace(engine=engine)
    loop = EngineLoop(Channel(ends[1]), built)  # type: ignore[arg-type]
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield engine, owner
    owner.send(Stop())
    thread.join(10)
    assert not thread.is_alive()
    for end in ends:
        end.close()


def _request(number: int) -> Add:
    return Add(Request(str(number), (1,), SamplingParams(), max_tokens=3))


def test_time_without_work_is_put_to_use_at_once_when_it_starts(running: Any) -> None:
    engine, _ = running
    assert engine.rehearsed.wait(5)
    assert engine.done == ["piece"] * 5


def test_a_message_waits_for_one_piece_at_most(running: Any) -> None:
    engine, owner = running
    assert engine.rehearsed.wait(5)
    engine.done.clear()
    engine.rehearsed.clear()
    engine.pieces = 1000
    owner.send(_request(0))
    while engine.done.count("piece") < 3:
        time.sleep(0.001)
    owner.send(Call(1, "picture", ()))
    pieces = engine.done.count("piece")
    while not any(isinstance(message, Reply) for message in owner.receive(wait=True)):
        pass
    assert engine.done.count("piece") <= pieces + 2
    engine.pieces = 0


def test_between_two_requests_in_a_row_nothing_is_rehearsed(running: Any) -> None:
    engine, owner = running
    assert engine.rehearsed.wait(5)
    engine.done.clear()
    engine.pieces = 1000
    for number in range(6):
        owner.send(_request(number))
        while engine.done.count("step") < 3 * (number + 1):
            time.sleep(0.001)
        time.sleep(0.01)  # shorter than what counts as quiet
    assert [one for one in engine.done if not one.startswith("add")] == ["step"] * 18
    engine.pieces = 0


def test_requests_that_come_during_the_first_step_are_in_the_next_plan(running: Any) -> None:
    engine, owner = running
    assert engine.rehearsed.wait(5)
    engine.done.clear()

    def more(meanwhile: Callable[[], None]) -> None:
        owner.send(_request(1))
        owner.send(Call(7, "picture", ()))  # between two steps: not while one runs
        owner.send(_request(2))
        meanwhile()
        engine.done.append("planned")

    engine.during = more
    owner.send(_request(0))
    replies = []
    while engine.done.count("step") < 4 or not replies:
        replies += [one for one in owner.receive(wait=True) if isinstance(one, Reply)]
    assert engine.done[:6] == ["add 0", "add 1", "planned", "step", "add 2", "step"]
    assert [reply.number for reply in replies] == [7]
