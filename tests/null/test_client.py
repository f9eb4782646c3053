"""The asyncio side over a real engine on the null backend: streams, cancellation, faults, shutdown."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from torch import Tensor

from halyard.hal.errors import ContextLengthError, EngineDeadError, QueueFullError, RequestError
from halyard.models.shapes import shape_config
from halyard.runtime.client import Client, RequestStream
from halyard.runtime.engine import Engine
from halyard.runtime.llm import LLM
from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import SamplingParams
from halyard.runtime.thread_port import ThreadPort


class ToyDetokenizer:
    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in token_ids)

    def flush(self) -> str:
        return ""


class ToyTokenizer:
    def detokenizer(self, skip_special_tokens: bool = True) -> ToyDetokenizer:
        return ToyDetokenizer()


@asynccontextmanager
async def running(tokenizer: Any = None, **options: Any) -> AsyncIterator[Client]:
    """A client that must end with every block free, unless its engine died."""
    config = shape_config("160m")
    config.vocab_size = 2048
    defaults = {"max_model_len": 512, "kv_blocks": 64, "host_kv_blocks": 0}
    llm = LLM(config, backend="null", load_format="dummy", **(defaults | options))
    client = Client(ThreadPort(llm.engine, llm.facts), tokenizer)
    try:
        yield client
        if client.alive:
            await until(lambda: not llm.engine.has_work())
    finally:
        await client.close()
    llm.engine.check_integrity()
    assert client.num_requests == 0
    assert llm.engine.stats().scheduler.blocks_used == 0


def engine_of(client: Client) -> Engine:
    assert isinstance(client.port, ThreadPort)
    return client.port.engine


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.005)


async def collect(stream: RequestStream) -> tuple[list[int], RequestDelta]:
    tokens: list[int] = []
    async for delta in stream:
        for completion in delta.completions:
            tokens.extend(completion.token_ids)
    return tokens, delta


def gate(client: Client) -> threading.Event:
    """Holds every step until it is set."""
    program = engine_of(client).executor.program
    healthy, opened = program.run, threading.Event()

    def slow(*args: Any) -> Tensor:
        assert opened.wait(20)
        return healthy(*args)

    program.run = slow  # type: ignore[method-assign, assignment]
    return opened


def pace(client: Client) -> None:
    """Makes steps slow enough that 500 tokens aren't over before anybody has looked."""
    program = engine_of(client).executor.program
    healthy = program.run

    def slow(*args: Any) -> Tensor:
        time.sleep(0.005)
        return healthy(*args)

    program.run = slow  # type: ignore[method-assign, assignment]


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scene(), 60)

    asyncio.run(bounded())


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **params)


def test_many_streams_at_once_bring_each_its_own_tokens() -> None:
    async def scene() -> None:
        async with running(kv_blocks=40, max_num_sequences=8) as client:
            streams = [client.submit([10 * i + 1], greedy(20 + i)) for i in range(24)]
            results = await asyncio.gather(*map(collect, streams))
            for i, (tokens, last) in enumerate(results):
                assert tokens == list(range(10 * i + 2, 10 * i + 22 + i))
                assert last.finished
                assert last.completions[0].finish_reason == "length"

    play(scene)


def test_cancel_frees_at_once_and_disturbs_nobody() -> None:
    async def scene() -> None:
        async with running() as client:
            pace(client)
            leaving = client.submit([5], greedy(500))
            staying = client.submit([100], greedy(60))
            first = await anext(leaving)
            assert first.completions[0].token_ids[0] == 6
            leaving.cancel()
            leaving.cancel()
            with pytest.raises(StopAsyncIteration):
                await anext(leaving)
            tokens, _ = await collect(staying)
            assert tokens == list(range(101, 161))
            await until(lambda: client.stats().scheduler.blocks_used == 0)
            assert client.stats().generated_tokens < 500

    play(scene)


def test_cancel_before_the_first_step() -> None:
    async def scene() -> None:
        async with running() as client:
            opened = gate(client)
            busy = client.submit([5], greedy(3))
            await until(lambda: engine_of(client).scheduler.stats().num_running == 1)
            waiting = client.submit([7], greedy(500))
            waiting.cancel()
            opened.set()
            assert (await collect(busy))[0] == [6, 7, 8]

    play(scene)


def test_a_full_queue_refuses_and_recovers() -> None:
    async def scene() -> None:
        async with running(max_num_sequences=1, max_queue_len=2) as client:
            opened = gate(client)
            streams = [client.submit([5], greedy(3))]
            await until(lambda: engine_of(client).scheduler.stats().num_running == 1)
            streams += [client.submit([5], greedy(3)) for _ in range(2)]
            with pytest.raises(QueueFullError, match="limit is 2") as refused:
                client.submit([5], greedy(3))
            assert refused.value.retry_after >= 1
            opened.set()
            for stream in streams:
                assert (await collect(stream))[0] == [6, 7, 8]
            assert (await collect(client.submit([5], greedy(1))))[0] == [6]

    play(scene)


def test_a_full_queue_locks_no_other_tenant_out() -> None:
    async def scene() -> None:
        async with running(max_num_sequences=1, max_queue_len=4) as client:
            opened = gate(client)
            streams = [client.submit([5], greedy(3), tenant="a")]
            await until(lambda: engine_of(client).scheduler.stats().num_running == 1)
            admitted = {"a": 0, "b": 0, "c": 0}
            waits = {}
            for tenant in admitted:
                try:
                    while True:
                        streams.append(client.submit([5], greedy(3), tenant=tenant))
                        admitted[tenant] += 1
                except QueueFullError as refused:
                    waits[tenant] = refused.retry_after
            assert admitted["a"] == 4
            assert 1 <= admitted["b"] <= 2
            assert 1 <= admitted["c"] <= 2
            with pytest.raises(QueueFullError):
                client.submit([5], greedy(3), tenant="a")
            assert all(wait >= 1 for wait in waits.values())
            opened.set()
            for stream in streams:
                assert (await collect(stream))[0] == [6, 7, 8]

    play(scene)


def test_invalid_requests_are_refused_at_once() -> None:
    async def scene() -> None:
        async with running() as client:
            with pytest.raises(ContextLengthError):
                client.submit([1] * 512, greedy(1))
            with pytest.raises(RequestError):
                client.submit([], greedy(1))
            with pytest.raises(RequestError):
                client.submit([9999], greedy(1))
            assert client.num_requests == 0

    play(scene)


def test_a_dead_device_answers_everybody_and_refuses_the_next() -> None:
    async def scene() -> None:
        async with running(max_num_sequences=2) as client:
            opened = gate(client)
            streams = [client.submit([5], greedy(100), request_id=f"r{i}") for i in range(5)]
            await until(lambda: engine_of(client).scheduler.stats().num_running == 2)

            def broken(*_: Any) -> Tensor:
                raise RuntimeError("the device fell off")

            engine_of(client).executor.program.run = broken  # type: ignore[method-assign, assignment]
            opened.set()
            for stream in streams:
                _, last = await collect(stream)
                assert last.finished
                assert last.completions[0].finish_reason == "error"
                assert "the device fell off" in (last.completions[0].error or "")
            assert not client.alive
            with pytest.raises(EngineDeadError, match="fell off"):
                client.submit([5], greedy(1))

    play(scene)


def test_a_reader_that_stays_behind_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halyard.runtime.client.MAX_PENDING", 4)

    async def scene() -> None:
        async with running() as client:
            pace(client)
            stream = client.submit([5], greedy(400))
            await until(lambda: client.num_requests == 0)
            await until(lambda: not engine_of(client).has_work())
            _, last = await collect(stream)
            assert "too slowly" in (last.completions[0].error or "")
            text = client.metrics.render(client.stats()).decode()
            assert re.search(r'requests_total\{.*finish_reason="abort".*\} 1.0', text)
            assert not client.metrics._requests._open

    play(scene)


def test_an_answer_that_its_time_cuts_short_is_no_cancelled_one() -> None:
    """Its client is there and reads it: it counts as it was told, with its latency and its tokens."""

    async def scene() -> None:
        async with running() as client:
            pace(client)
            stream = client.submit([5], greedy(400))
            await anext(stream)
            stream.cut("deadline")
            assert (await collect(stream))[1].finished
            text = client.metrics.render(client.stats()).decode()
            assert re.search(r'requests_total\{.*finish_reason="length".*\} 1.0', text)
            assert re.search(r"request_generation_tokens_count\{.*\} 1.0", text)
            assert 'finish_reason="abort"' not in text
            assert 'type="cancelled"' not in text

    play(scene)


def test_a_picture_asked_of_an_engine_that_ends_is_refused() -> None:
    async def scene() -> None:
        async with running() as client:
            opened = gate(client)
            stream = client.submit([5], greedy(100))
            await until(lambda: engine_of(client).scheduler.stats().num_running == 1)

            entered, asked_for = threading.Event(), threading.Event()

            def broken(*_: Any) -> Tensor:
                entered.set()
                assert asked_for.wait(20)
                raise RuntimeError("the device fell off")

            engine_of(client).executor.program.run = broken  # type: ignore[method-assign, assignment]
            opened.set()
            await until(entered.is_set)
            asked = asyncio.create_task(client.picture())
            await asyncio.sleep(0)  # it is in the inbox, behind a step that fails
            asked_for.set()
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(asked, 5)
            await collect(stream)

    play(scene)


def test_only_requests_count_as_waiting() -> None:
    async def scene() -> None:
        async with running() as client:
            opened = gate(client)
            stream = client.submit([5], greedy(3))
            await until(lambda: engine_of(client).scheduler.stats().num_running == 1)
            for _ in range(3):
                client.port.abort("unknown")
            assert client.port.num_waiting == 0
            waiting = client.submit([5], greedy(3))
            assert client.port.num_waiting == 1
            opened.set()
            await collect(stream)
            await collect(waiting)
            assert client.port.num_waiting == 0

    play(scene)


def test_close_drains_what_runs_and_refuses_what_comes() -> None:
    async def scene() -> None:
        async with running() as client:
            stream = client.submit([5], greedy(40))
            closing = asyncio.create_task(client.close(drain_seconds=20))
            await asyncio.sleep(0)
            with pytest.raises(EngineDeadError, match="shutting down"):
                client.submit([5], greedy(1))
            assert (await collect(stream))[0] == list(range(6, 46))
            await closing
            assert not client.alive

    play(scene)


def test_close_without_patience_answers_what_runs() -> None:
    async def scene() -> None:
        async with running() as client:
            pace(client)
            stream = client.submit([5], greedy(500))
            await anext(stream)
            await client.close()
            _, last = await collect(stream)
            assert last.completions[0].finish_reason == "error"
            assert last.completions[0].error == "the server is shutting down"

    play(scene)


def test_a_stop_string_ends_one_answer_and_frees_it() -> None:
    async def scene() -> None:
        async with running(ToyTokenizer()) as client:
            pace(client)
            stream = client.submit([5], greedy(500, stop="<9><10>", n=2))
            text = ["", ""]
            async for delta in stream:
                for completion in delta.completions:
                    text[completion.index] += completion.text
            assert text == ["<6><7><8>"] * 2
            assert {c.finish_reason for c in delta.completions} == {"stop"}
            assert {c.stop_reason for c in delta.completions} == {"<9><10>"}
            await until(lambda: client.stats().scheduler.blocks_used == 0)
            assert client.stats().generated_tokens < 900

    play(scene)


def test_what_a_late_reader_finds_comes_as_one_and_every_stream_gets_its_part() -> None:
    async def scene() -> None:
        async with running(ToyTokenizer()) as client:
            streams = [client.submit([10 * i], greedy(8, n=2)) for i in range(4)]
            await until(lambda: client.num_requests == 0)
            for i, stream in enumerate(streams):
                delta = await anext(stream)
                tokens = tuple(range(10 * i + 1, 10 * i + 9))
                text = "".join(f"<{token}>" for token in tokens)
                assert [(c.text, c.token_ids) for c in delta.completions] == [(text, tokens)] * 2
                assert delta.finished
                assert [c.finish_reason for c in delta.completions] == ["length"] * 2
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)

    play(scene)


def test_text_that_waited_comes_before_the_error_that_followed_it() -> None:
    async def scene() -> None:
        async with running(ToyTokenizer()) as client:
            pace(client)
            stream = client.submit([5], greedy(500))
            await until(lambda: len(stream._deltas) > 3)
            client.give_up("no reason")
            text, error = await anext(stream), await anext(stream)
            assert text.completions[0].text.startswith("<6><7><8><9>")
            assert text.completions[0].error is None
            assert error.completions[0].error == "no reason"

    play(scene)
