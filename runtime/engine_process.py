"""The engine's own process: builds the engine, runs the step loop, speaks with its owner over a socket.

Nothing of HTTP, text or JSON happens here, so the step loop has the interpreter to itself. It is one
thread: between two steps it takes what has come in, and with no work it sleeps in the socket.
Started by `process_port.launch` as `python -m halyard.runtime.engine_process DESCRIPTOR`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from halyard.hal.errors import EngineDeadError, HalyardError
from halyard.runtime.engine import ASLEEP
from halyard.runtime.messages import (
    Abort,
    Add,
    Call,
    Channel,
    Failed,
    LogLine,
    Phase,
    Ready,
    Reply,
    Start,
    Step,
    Stop,
)
from halyard.runtime.plan import TokenEvent
from halyard.runtime.token_columns import Splitter

if TYPE_CHECKING:
    from halyard.runtime.build import BuiltEngine
    from halyard.runtime.metrics import Metrics
    from halyard.runtime.request import Request, SamplingParams

__all__ = ["EngineLoop", "main"]

logger = logging.getLogger("halyard.engine")

_STATS_SECONDS = 0.05  # a busy engine tells its numbers that often
# Once kernels are compiled a start may take so much longer for what the first steps need: rehearsal.py
_READY_SECONDS = 0.8
_QUIET_SECONDS = 0.25  # without work, until the time is put to use for what later ones need
_DIE_WITH_PARENT = 1  # Linux' PR_SET_PDEATHSIG


class _Observations:
    """Stands in for Metrics: notes what the engine observes, for the owner's Metrics to count."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("observe_"):
            raise AttributeError(name)
        return lambda *values: self.noted.append((name, values))


class EngineLoop:
    """Steps, and the messages between them."""

    def __init__(self, channel: Channel, built: BuiltEngine) -> None:
        self.channel = channel
        self.built = built
        self.engine = built.engine
        self._observations = _Observations()
        self.engine.metrics = cast("Metrics", self._observations)
        self._received = 0
        self._inbox: deque[Any] = deque()  # what came in during a step and waits for its end
        self._events: list[TokenEvent] = []  # that no step brought: refusals
        self._splitter = Splitter()
        self._told_stats = 0.0
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="halyard-compile")

    def run(self) -> None:
        """Until the owner says stop.

        Raises:
            EOFError, OSError: the owner is gone.
            Exception: a step failed; nothing can go on.
        """
        engine = self.engine
        self._rehearse(0.0)
        while True:
            idle = not engine.has_work()
            messages = list(self._inbox) or self.channel.receive(wait=idle)
            self._inbox.clear()
            for message in messages:
                self._received += 1
                if isinstance(message, Stop):
                    return
                self._take(message)
            if engine.has_work():
                # The first step of a burst has few of its requests: the next one is planned with more.
                self._tell(engine.step(self._take_requests if idle else None))
            elif messages:
                self._tell([])
            if not engine.has_work() and not self._inbox:
                self._rehearse(_QUIET_SECONDS)

    def _rehearse(self, quiet: float) -> None:
        """Once nothing has come in for `quiet` seconds: what steps to come will need, until it does."""
        while not self.channel.wait(quiet) and self.engine.rehearse():
            quiet = 0.0

    def _take_requests(self) -> None:
        """Take in what requests have come, during a step; the rest waits for its end."""
        self._inbox.extend(self.channel.receive(wait=False))
        while self._inbox and isinstance(self._inbox[0], Add):
            self._received += 1
            self._take(self._inbox.popleft())

    def _take(self, message: Any) -> None:
        match message:
            case Add(request):
                self._add(request)
            case Abort(request_id, answer):
                self.engine.abort(request_id, answer)
            case Call():
                self._answer(message)
            case _:
                raise AssertionError(f"no message for an engine: {message!r}")

    def _add(self, request: Request) -> None:
        if self.engine.asleep:
            self._refuse(request, ASLEEP)
            return
        if request.params.guided is not None and request.guidance is None:
            try:
                guidance = self.engine.intake.guidance(request.params)  # compiled by `prepare`
            except HalyardError as error:
                self._refuse(request, str(error))
                return
            request = replace(request, guidance=guidance)
        self.engine.add(request)

    def _refuse(self, request: Request, error: str) -> None:
        self._events += [
            TokenEvent(request.request_id, index, finish_reason="error", error=error)
            for index in range(request.params.n)
        ]

    def _answer(self, call: Call) -> None:
        match call.name:
            case "prepare":
                self._compiling.submit(self._prepare, call.number, *call.arguments)
            case "picture":
                self._reply(call.number, self.engine.picture)
            case "check_integrity":
                self._reply(call.number, self.engine.check_integrity)
            case "sleep":
                self._reply(call.number, self.engine.sleep)
            case "wake":
                self._reply(call.number, self.engine.wake)
            case name:
                raise AssertionError(f"no call for an engine: {name}")

    def _prepare(self, number: int, params: SamplingParams) -> None:
        def compile_it() -> None:
            self.engine.intake.guidance(params)

        with contextlib.suppress(OSError):  # the owner is gone: the step loop finds that too
            self._reply(number, compile_it)

    def _reply(self, number: int, work: Any) -> None:
        try:
            reply = Reply(number, work())
        except Exception as error:  # noqa: BLE001  # told to the caller
            reply = Reply(number, None, portable(error))
        self.channel.send(reply)

    def _tell(self, events: list[TokenEvent]) -> None:
        if self._events:
            events, self._events = [*self._events, *events], []
        busy = self.engine.has_work()
        now = time.monotonic()
        stats = observations = b""
        if not busy or now - self._told_stats > _STATS_SECONDS:
            self._told_stats = now
            stats = pickle.dumps(self.engine.stats(), protocol=5)
            observations = pickle.dumps(self._observations.noted, protocol=5)
            self._observations.noted.clear()
        waiting = self.engine.num_waiting
        tokens, others = self._splitter.split(events)
        self.channel.send(Step(others, waiting, self._received, busy, observations, stats, tokens))


class _LogSender(logging.Handler):
    """Log records go to the owner, whose handlers decide where they end up."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the owner is gone, and this process soon
            self._channel.send(LogLine(record.name, record.levelno, self.format(record)))


def portable(error: Exception) -> Exception:
    """An error that another process can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever its constructor or state does
        return HalyardError(f"{type(error).__name__}: {error}")
    return error


def main(arguments: list[str]) -> int:
    """Serve the owner at the other end of a socket that was inherited."""
    # The owner decides when to stop: Ctrl-C reaches the whole group, and so may SIGTERM. It started
    # this process with both blocked, so that none hits before this line. Handlers that do nothing,
    # because what is ignored stays ignored in a compiler that is started from here.
    signal.signal(signal.SIGINT, _not_mine)
    signal.signal(signal.SIGTERM, _not_mine)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    _die_with_parent()
    channel = Channel(socket.socket(fileno=int(arguments[0])))
    try:
        return _serve(channel)
    except (EOFError, OSError):
        return 0  # the owner is gone


def _serve(channel: Channel) -> int:
    start: Start = channel.receive(wait=True)[0]
    logging.basicConfig(level=start.log_level, handlers=[_LogSender(channel)], format="%(message)s")
    from halyard.runtime.build import build_engine

    try:
        built = build_engine(
            start.config, lambda phase: channel.send(Phase(phase)), tokenizer_later=True
        )
    except Exception as error:  # the owner reports it
        if not isinstance(error, HalyardError):
            logger.exception("loading failed")
        channel.send(Failed(portable(error)))
        return 1
    # What is there now stays: the collector needn't look through torch and the model in every step.
    gc.collect()
    gc.freeze()
    loop = EngineLoop(channel, built)
    built.engine.rehearse()
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and built.engine.rehearse():
        pass
    channel.send(Ready(built.facts, built.engine.stats()))
    try:
        loop.run()
    except (EOFError, OSError):
        raise
    except Exception as error:
        logger.exception("the engine stopped")
        reason = f"the engine stopped: {type(error).__name__}: {error}"
        channel.send(Failed(EngineDeadError(reason)))
        return 1
    finally:
        built.engine.close()
    return 0


def _not_mine(_signal: int, _frame: FrameType | None) -> None:
    return None


def _die_with_parent() -> None:
    """Should the owner be killed while a step hangs, nobody would read the end of the socket."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # all that is worth saving is saved; taking torch apart takes a second
