"""An engine in a process of its own, on the null backend: answers, refusals, death, hanging, orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from halyard.hal.errors import ConfigError, EngineDeadError, RequestError
from halyard.runtime.client import Client, RequestStream
from halyard.runtime.config import EngineConfig
from halyard.runtime.messages import Abort, Add, Channel, Failed, Ready, Step, encode
from halyard.runtime.plan import TokenEvent, TokenLogprob
from halyard.runtime.process_port import ProcessPort, end_all, launch
from halyard.runtime.request import Constraint, SamplingParams

VOCAB = 2048


def config(**options: Any) -> EngineConfig:
    """The embedded checkpoint's shape and tokenizer; the null backend reads no weight."""
    small = {"max_model_len": 1024, "kv_blocks": 256, "host_kv_blocks": 0}
    return EngineConfig.create(model="embedded", backend="null", **(small | options))


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    end_all()


_bound: ContextVar[asyncio.Timeout] = ContextVar("_bound")


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """A minute for what happens; starting an engine is no part of it, for that is slow under load."""

    async def bounded() -> None:
        async with asyncio.timeout(60) as bound:
            _bound.set(bound)
            await scene()

    asyncio.run(bounded())


async def port(hang_seconds: float | None = None, **options: Any) -> ProcessPort:
    bound, loop = _bound.get(), asyncio.get_running_loop()
    bound.reschedule(loop.time() + 600)
    starting = launch(config(**options))
    ready = await asyncio.to_thread(starting.wait, lambda _: None, hang_seconds=hang_seconds)
    bound.reschedule(loop.time() + 60)
    return ready


async def collect(stream: RequestStream) -> tuple[list[int], str | None]:
    """All tokens, and the error if it ended with one."""
    tokens: list[int] = []
    async for delta in stream:
        for new in delta.completions:
            tokens.extend(new.token_ids)
    return tokens, delta.completions[0].error


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)


def test_a_whole_life() -> None:
    async def scene() -> None:
        engine = await port(max_num_sequences=16)
        client = Client(engine, None)
        streams = [client.submit([10 * i + 100], greedy(20 + i)) for i in range(40)]
        leaving = client.submit([500], greedy(900))
        await anext(leaving)
        leaving.cancel()
        for i, (tokens, error) in enumerate(await asyncio.gather(*map(collect, streams))):
            assert error is None
            assert tokens == list(range(10 * i + 101, 10 * i + 121 + i))
        with pytest.raises(RequestError):
            client.submit([10**9], greedy(1))
        with pytest.raises(RequestError, match="guided"):
            await client.prepare(greedy(4, guided=Constraint.regex("(")))
        params = greedy(4, guided=Constraint.regex("[ab]{9}"))
        await client.prepare(params)
        assert (await collect(client.submit([5], params)))[1] is None
        bad = greedy(4, guided=Constraint.regex("("))  # not prepared: refused when it is to run
        assert "guided" in ((await collect(client.submit([5], bad)))[1] or "")
        await engine.call("check_integrity")
        stats = client.stats()
        assert stats.scheduler.blocks_used == 0
        assert stats.generated_tokens >= sum(range(20, 60))
        text = client.metrics.render(stats).decode()
        assert 'halyard_step_duration_seconds_count{backend="null",model="embedded"} ' in text
        await client.close()
        with pytest.raises(ProcessLookupError):
            os.kill(engine.pid, 0)

    play(scene)


def test_a_killed_engine_answers_everybody() -> None:
    async def scene() -> None:
        engine = await port()
        client, reasons = Client(engine, None), []
        client.start(reasons.append)
        streams = [client.submit([7], greedy(1000)) for _ in range(8)]
        await anext(streams[0])
        os.kill(engine.pid, signal.SIGKILL)
        for stream in streams:
            assert "SIGKILL" in ((await collect(stream))[1] or "")
        assert len(reasons) == 1
        assert not client.alive
        left = engine.stats().scheduler  # what metrics and the page show until another is there
        assert (left.num_running, left.num_waiting, left.blocks_used) == (0, 0, 0)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            client.submit([7], greedy(1))
        with pytest.raises(EngineDeadError):
            await engine.call("check_integrity")
        await client.close()

    play(scene)


def test_only_requests_count_as_waiting_there() -> None:
    async def scene() -> None:
        engine = await port()
        client = Client(engine, None)
        client.start()
        os.kill(engine.pid, signal.SIGSTOP)
        for _ in range(3):
            engine.abort("unknown")
        assert engine.num_waiting == 0
        stream = client.submit([7], greedy(5))
        assert engine.num_waiting == engine.stats().scheduler.num_waiting == 1
        os.kill(engine.pid, signal.SIGCONT)
        await collect(stream)
        assert engine.num_waiting == 0
        await client.close()

    play(scene)


def test_an_engine_that_fails_and_then_hangs_answers_everybody() -> None:
    """What it says last is that it failed; closing the device may then take for ever."""

    async def scene() -> None:
        ours, theirs = socket.socketpair()
        hanging = [sys.executable, "-c", "import time; time.sleep(60)"]
        process = subprocess.Popen(hanging, pass_fds=[theirs.fileno()])
        donor = await port()
        facts = Ready(donor.facts, donor.stats())
        engine = ProcessPort(config(), process, Channel(ours), facts, 30.0, None)
        client = Client(engine, None)
        stream = client.submit([7], greedy(5))
        Channel(theirs).send(Failed(EngineDeadError("the device fell off")))
        theirs.close()  # the process holds its end
        _, error = await asyncio.wait_for(collect(stream), 10)
        assert "fell off" in (error or "")
        with pytest.raises(EngineDeadError, match="fell off"):
            client.submit([7], greedy(5))
        await client.close()
        await donor.close()

    play(scene)


def test_an_engine_that_hangs_with_work_is_ended_and_an_idle_one_is_not() -> None:
    async def scene() -> None:
        engine = await port(hang_seconds=0.4)
        client = Client(engine, None)
        client.start()
        os.kill(engine.pid, signal.SIGSTOP)
        await asyncio.sleep(1.0)
        assert client.alive  # nobody waits for it
        started = time.monotonic()
        _, error = await collect(client.submit([7], greedy(5)))
        assert "hung" in (error or "")
        assert time.monotonic() - started > 0.4  # a step may take that long
        await client.close()

    play(scene)


def test_loading_that_fails_brings_the_error_over() -> None:
    with pytest.raises(ConfigError, match="positions"):
        launch(config(max_model_len=10**6)).wait(lambda _: None)
    starting = launch(config())
    starting.process.kill()
    with pytest.raises(EngineDeadError, match="while loading"):
        starting.wait(lambda _: None)


def test_an_engine_dies_with_its_owner_even_when_that_is_killed() -> None:
    code = (
        "import sys, threading\n"
        "from test_process_port import config, launch\n"
        "port = launch(config()).wait(lambda _: None)\n"
        "print(port.pid, flush=True)\n"
        "threading.Event().wait()\n"
    )
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, *sys.path])
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    os.kill(pid, 0)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{pid}")


def test_frames_come_whole_however_they_are_cut() -> None:
    import socket

    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    logprob = TokenLogprob(5, -0.5, 1, ((5, -0.5), (6, -1.5)))
    step = Step(
        [
            TokenEvent("a", 1, (5,), (logprob,), (logprob,), "stop", "x", 3),
            TokenEvent("b", 0, finish_reason="error", error="broken"),
        ],
        num_waiting=4,
        num_received=9,
        busy=True,
    )
    data = encode(Abort("a", None)) + encode(step) + encode(Add("anything"))  # type: ignore[arg-type]
    got: list[Any] = []
    for cut in range(0, len(data), 7):
        theirs.sendall(data[cut : cut + 7])
        got += channel.receive(wait=False)
    assert got[0] == Abort("a", None)
    assert got[1] == step
    assert isinstance(got[1].events[0], TokenEvent)
    assert got[1].events[0].logprobs[0].top == ((5, -0.5), (6, -1.5))
    assert got[2] == Add("anything")  # type: ignore[arg-type]
    theirs.close()
    with pytest.raises(EOFError):
        channel.receive(wait=True)
    ours.close()
