"""An engine in a process of its own, seen from its owner. No torch.

Messages go out without waiting for the engine, and steps come in as events of the event loop; where
the loop is late, the steps that have piled up are delivered as one. After a delivery that kept the
loop busy it lets a few pile up: what an event to a client costs is shared by the tokens in it. So it
does while many requests come, which the loop has to take in beside that.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from halyard.hal.errors import EngineDeadError
from halyard.runtime.config import EngineConfig
from halyard.runtime.intake import Intake
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
    encode,
)
from halyard.runtime.metrics import Metrics
from halyard.runtime.port import Deliver, Died
from halyard.runtime.request import Constraint, Request, SamplingParams
from halyard.runtime.token_columns import Joiner

if TYPE_CHECKING:
    from halyard.runtime.engine import EngineStats
    from halyard.runtime.picture import EnginePicture

__all__ = ["Launch", "ProcessPort", "end_all", "launch"]

logger = logging.getLogger("halyard.engine")

_STOP_SECONDS = 3.0  # a process that was told to stop gets that long
_LOOKS = 4  # in the time that a step may take
_BUSY_SECONDS = 0.003  # a delivery that costs the loop less is followed by the next at once
_REST = 0.5  # of the time that a longer one took nothing is read
_ARRIVAL_SECONDS = 0.002  # a delivery counts as long as so much for each request since the last one
_MAX_REST_SECONDS = 0.02  # which delays tokens, and other requests' first ones
_SEND_BUFFER = 1 << 20  # bytes that the engine may be ahead; the system may allow less
_processes: set[subprocess.Popen[bytes]] = set()


def _block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


# One thread starts all engines. It lives as long as this process: Linux kills an engine with the
# thread that started it. What it starts inherits its blocked signals, until it has handlers.
_starter = ThreadPoolExecutor(1, thread_name_prefix="halyard-start", initializer=_block_signals)


class _CompiledThere:
    """Constraints are compiled in the engine's process, where they are used."""

    def guidance(self, constraint: Constraint) -> None:
        return None


class Launch:
    """An engine process that loads. `wait` ends in a port, or in the error of the other side."""

    def __init__(self, config: EngineConfig, process: subprocess.Popen[bytes], channel: Channel):
        self.config = config
        self.process = process
        self._channel = channel

    def wait(
        self,
        tell: Callable[[str], None],
        *,
        hang_seconds: float | None = None,
        metrics: Metrics | None = None,
    ) -> ProcessPort:
        """Until the engine is loaded: seconds to minutes.

        Args:
            tell: is called with the name of each phase as it begins.
            hang_seconds: a step that takes longer is taken for a hang; None: any may take for ever.
            metrics: of the engine whose place this one takes.

        Raises:
            HalyardError: loading failed; one line says why.
        """
        try:
            while True:
                for message in self._channel.receive(wait=True):
                    match message:
                        case Phase(name):
                            tell(name)
                        case LogLine():
                            _log(message)
                        case Failed(error):
                            raise error
                        case Ready():
                            return ProcessPort(
                                self.config,
                                self.process,
                                self._channel,
                                message,
                                hang_seconds,
                                metrics,
                            )
                        case _:
                            raise AssertionError(f"no message of a loading engine: {message!r}")
        except EOFError:
            self.end()
            how = _how_it_ended(self.process.returncode)
            raise EngineDeadError(f"the engine's process {how} while loading") from None
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Kill the process."""
        _end(self.process)


def launch(config: EngineConfig) -> Launch:
    """Start an engine's process; returns at once. Any thread may call it."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    process = _starter.submit(_start, theirs).result()
    theirs.close()
    _processes.add(process)
    channel = Channel(ours)
    channel.send(Start(config, logging.getLogger().level))
    return Launch(config, process, channel)


def _start(end: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "halyard.runtime.engine_process", str(end.fileno())]
    # What can be imported here can be imported there.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        command,
        pass_fds=[end.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=2,  # standard output is for the owner's words
        env=os.environ | {"PYTHONPATH": path},
    )


def end_all() -> None:
    """Kill every engine process of this one: it is about to end in a hurry."""
    for process in list(_processes):
        _end(process)


atexit.register(end_all)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    _processes.discard(process)


def _how_it_ended(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed ({signal.Signals(-status).name})"
    return f"ended by itself (status {status})"


def _log(line: LogLine) -> None:
    target = logging.getLogger(line.name)
    if target.isEnabledFor(line.level):
        target.handle(
            logging.LogRecord(line.name, line.level, "engine process", 0, line.text, None, None)
        )


class ProcessPort:
    """Implements EnginePort; its methods are documented there."""

    def __init__(
        self,
        config: EngineConfig,
        process: subprocess.Popen[bytes],
        channel: Channel,
        ready: Ready,
        hang_seconds: float | None,
        metrics: Metrics | None,
    ) -> None:
        self.facts = facts = ready.facts
        self.pid = process.pid
        self.intake = Intake(
            facts.limits, facts.seed, _CompiledThere() if facts.has_tokenizer else None
        )
        self.metrics = Metrics.after(
            metrics, facts.model_name, facts.backend_name, facts.bytes_per_block
        )
        self._process = process
        self._channel = channel
        self._hang_seconds = hang_seconds
        self._stats, self._stats_time = ready.stats, time.monotonic()
        self._waiting = 0
        self._busy = False
        self._sent = 0
        self._received = 0  # of those sent, by the engine
        self._added: deque[int] = deque()  # which of those it has not received are requests
        self._frames = 0
        self._joiner = Joiner()
        self._outgoing = bytearray()
        self._writing = False  # the loop tells when more can be sent
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_numbers = itertools.count()
        self._closing = False
        self._reason: str | None = None  # why it is dead
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._reading = False  # the loop tells when something came
        self._rest: asyncio.TimerHandle | None = None  # while nothing is read
        self._arrivals = 0  # requests since the last delivery
        self._burial: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._reason is None and not self._closing

    @property
    def num_waiting(self) -> int:
        return self._waiting + len(self._added)

    def start(self, deliver: Deliver, died: Died) -> None:
        self._deliver, self._died = deliver, died
        self._loop = asyncio.get_running_loop()
        self._listen(self._loop)
        if self._hang_seconds is not None:
            self._look(self._frames, 0)

    def add(self, request: Request) -> None:
        self._send(Add(request))
        self._added.append(self._sent)
        self._arrivals += 1

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._send(Abort(request_id, index))

    def stats(self) -> EngineStats:
        told, since = self._stats, time.monotonic() - self._stats_time
        # Those that it has not taken in wait too: it may hang. A dead one has nothing any more.
        scheduler = (
            replace(told.scheduler, num_waiting=told.scheduler.num_waiting + len(self._added))
            if self._reason is None
            else replace(
                told.scheduler,
                num_running=0,
                num_waiting=0,
                num_swapped=0,
                blocks_used=0,
                blocks_cached=0,
                host_blocks_used=0,
                host_blocks_cached=0,
            )
        )
        return replace(told, scheduler=scheduler, uptime_seconds=told.uptime_seconds + since)

    async def picture(self) -> EnginePicture:
        picture: EnginePicture = await self.call("picture")
        return picture

    async def prepare(self, params: SamplingParams) -> None:
        if params.guided is not None:
            self.intake.guidance(params)  # refuses where there is no tokenizer
            await self.call("prepare", params)

    async def call(self, name: str, *arguments: Any) -> Any:
        """Have the engine do something between two steps.

        Raises:
            EngineDeadError: it is dead, or dies before it answers.
        """
        if not self.alive or self._loop is None:
            raise EngineDeadError(self._reason or "the engine is stopping")
        number = next(self._call_numbers)
        future = self._calls[number] = self._loop.create_future()
        self._send(Call(number, name, arguments))
        try:
            return await future
        finally:
            self._calls.pop(number, None)

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._send(Stop())
        deadline = time.monotonic() + _STOP_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        self._detach()
        await asyncio.to_thread(_end, self._process)
        self._channel.socket.close()
        self._fail_calls("the engine is stopping")

    # -- out ------------------------------------------------------------------------------------

    def _send(self, message: Any) -> None:
        if self._reason is not None:
            return  # it takes nothing any more, and everybody is told so
        self._sent += 1
        self._outgoing += encode(message)
        self._flush()

    def _flush(self) -> None:
        waiting = False
        while self._outgoing:
            try:
                sent = self._channel.socket.send(self._outgoing, socket.MSG_DONTWAIT)
            except BlockingIOError:
                waiting = True
                break
            except OSError:
                self._outgoing.clear()  # it is dead: the reading side finds out why
                break
            del self._outgoing[:sent]
        if self._loop is None or waiting == self._writing:
            return  # nearly always: to ask the loop costs as much as to send
        self._writing = waiting
        if waiting:
            self._loop.add_writer(self._channel.socket, self._flush)
        else:
            self._loop.remove_writer(self._channel.socket)

    # -- in -------------------------------------------------------------------------------------

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        self._rest = None
        self._reading = True
        loop.add_reader(self._channel.socket, self._read, loop)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        started = loop.time()
        try:
            messages = self._channel.receive(wait=False)
        except EOFError:
            self._lost()
            return
        for message in messages:
            match message:
                case Step():
                    self._joiner.add(message.tokens, message.events)
                    self._take_step(message)
                case Reply(number, value, error):
                    self._take_reply(number, value, error)
                case LogLine():
                    _log(message)
                case Failed(error):
                    self._reason = str(error)
                    # It closes the device next, which may take for ever when that has failed.
                    self._process.kill()  # the socket's end tells the rest
                case _:
                    raise AssertionError(f"no message of an engine: {message!r}")
        if events := self._joiner.take():
            self._deliver(events)
            # Behind the readers that this woke: then it is known what the delivery costs.
            loop.call_soon(self._pace, loop, started)

    def _pace(self, loop: asyncio.AbstractEventLoop, started: float) -> None:
        """Let steps pile up, if one took long to hand out, or while many requests come.

        This loop takes requests in too, and a full batch waits for the last of them: the first
        ones' tokens wait instead.
        """
        busy = max(loop.time() - started, _ARRIVAL_SECONDS * self._arrivals)
        self._arrivals = 0
        if busy < _BUSY_SECONDS or not self._reading:  # it rests, or nothing comes any more
            return
        self._reading = False
        loop.remove_reader(self._channel.socket)
        rest = min(_REST * busy, _MAX_REST_SECONDS)
        self._rest = loop.call_later(rest, self._listen, loop)

    def _take_step(self, step: Step) -> None:
        self._frames += 1
        self._waiting, self._received, self._busy = step.num_waiting, step.num_received, step.busy
        while self._added and self._added[0] <= step.num_received:
            self._added.popleft()
        if step.stats:
            self._stats, self._stats_time = pickle.loads(step.stats), time.monotonic()
        if step.observations:
            for name, values in pickle.loads(step.observations):
                getattr(self.metrics, name)(*values)

    def _take_reply(self, number: int, value: Any, error: Exception | None) -> None:
        self._frames += 1
        future = self._calls.get(number)
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    # -- the end --------------------------------------------------------------------------------

    def _look(self, frames: int, silent: int) -> None:
        """Count looks, not seconds: where this loop is late, the engine is not to blame."""
        if self._loop is None or self._hang_seconds is None or not self.alive:
            return
        working = self._busy or self._sent != self._received
        if self._rest is None:  # else what it sent may not be read yet
            silent = silent + 1 if working and frames == self._frames else 0
        if silent > _LOOKS:  # the first of them came at any time after the work did
            self._reason = f"the engine hung: no step ended in {self._hang_seconds:g} seconds"
            logger.error("%s: its process is killed", self._reason)
            self._process.kill()  # the socket's end tells the rest
            return
        delay = self._hang_seconds / _LOOKS
        self._watch = self._loop.call_later(delay, self._look, self._frames, silent)

    def _lost(self) -> None:
        self._detach()
        if not self._closing and self._loop is not None:
            self._burial = self._loop.create_task(self._bury())

    async def _bury(self) -> None:
        await asyncio.to_thread(self._process.wait)
        _processes.discard(self._process)
        if self._reason is None:
            self._reason = f"the engine's process {_how_it_ended(self._process.returncode)}"
        self._fail_calls(self._reason)
        self._died(self._reason)

    def _detach(self) -> None:
        self._reading = False
        if self._loop is not None:
            self._loop.remove_reader(self._channel.socket)
            self._loop.remove_writer(self._channel.socket)
        for timer in (self._watch, self._rest):
            if timer is not None:
                timer.cancel()

    def _fail_calls(self, reason: str) -> None:
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
