"""The load client against a real server: counts, times, goals, failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import live_server

from halyard.api.cli.bench_serve import _line
from halyard.api.cli.main import main
from halyard.api.load import Goal, LoadRun, Timing, run_load, summary
from halyard.api.stream_reader import StreamReader
from halyard.hal.errors import ConfigError
from halyard.hal.kernels.native.library import find_compiler
from halyard.runtime.workloads import WorkloadRequest

BACKEND = "reference" if find_compiler() is None else "cpu-eager"
REQUESTS = [WorkloadRequest((5 + i, 6 + i), 4 + i) for i in range(6)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(BACKEND) as served:
        yield served.url


def test_closed_and_open_loop(url: str) -> None:
    for load in ({"concurrency": 2}, {"rate": 200.0}, {}):
        done = asyncio.run(run_load(url, "embedded", REQUESTS, **load))  # type: ignore[arg-type]
        found = summary(done, Goal(ttft=60.0, tpot=60.0))
        assert (found["failed"], found["requests"], found["goal_met"]) == (0, 6, 1.0)
        assert found["output_tokens"] == sum(one.max_tokens for one in REQUESTS)
        for timing in done.timings:
            assert timing.started <= timing.tokens[0] <= timing.tokens[-1] <= timing.ended
    assert summary(done, Goal(ttft=0.0))["goal_met"] == 0.0


def test_failures_are_counted_and_named(url: str) -> None:
    done = asyncio.run(run_load(url, "no such model", REQUESTS[:2]))
    found = summary(done, Goal())
    assert found["failed"] == 2
    assert "status 404" in found["errors"][0]
    nobody = asyncio.run(run_load("http://127.0.0.1:9", "embedded", REQUESTS[:1]))
    assert "refused" in str(nobody.timings[0].error)
    with pytest.raises(ConfigError, match="http://"):
        asyncio.run(run_load("https://somewhere", "embedded", REQUESTS))


def test_a_host_s_other_address_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo

    def two(host: str, port: int, *more: Any, **named: Any) -> Any:
        dead, alive = (found(one, port, *more, **named) for one in ("127.0.0.2", "127.0.0.1"))
        return [*dead, *alive]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    done = asyncio.run(run_load(url.replace("127.0.0.1", "there"), "embedded", REQUESTS[:2]))
    assert [timing.error for timing in done.timings] == [None, None]


def test_a_server_that_is_slow_to_answer_the_connection_or_breaks_off() -> None:
    def serve(listener: socket.socket, answer: bytes) -> None:
        asked = b""
        while not asked:  # others have gone away
            served, _ = listener.accept()
            with served:
                served.settimeout(20)
                while not asked.endswith(b"}") and (piece := served.recv(4096)):
                    asked += piece
                if asked:
                    served.sendall(answer)

    async def one(others: int, answer: bytes) -> str | None:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.settimeout(20)
            listener.listen(0)
            filling = stack.enter_context(contextlib.ExitStack())
            # More than the system holds here: the next one's handshake waits.
            for _ in range(others):
                other = filling.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(listener.getsockname())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            run = asyncio.create_task(run_load(url, "any", REQUESTS[:1]))
            await asyncio.sleep(0.2)
            assert not run.done()
            filling.close()
            await asyncio.to_thread(serve, listener, answer)
            return (await run).timings[0].error

    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    event = b'data: {"choices":[{}]}\n\n'
    assert asyncio.run(one(3, head + event + b"data: [DONE]\n\n")) is None
    assert "broke off" in str(asyncio.run(one(0, head + event)))
    assert "broke off" in str(asyncio.run(one(0, b"HTTP/1.1 200 OK\r\n")))
    refusal = asyncio.run(one(0, b"HTTP/1.1 503 Busy\r\n\r\ntoo many"))
    assert refusal == "ValueError: status 503: too many"
    assert "can't be read" in str(asyncio.run(one(0, head + b"data: {\n\n")))


def test_the_command_prints_one_object_last(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text('{"prompt_token_ids": [5, 6], "max_tokens": 3}\n' * 3)
    arguments = ["bench", "serve", "--url", url, "--workload", str(file)]
    assert main([*arguments, "--concurrency", "1", "3", "--requests", "2"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert [run["concurrency"] for run in found["runs"]] == [1, 3]
    assert found["requests"] == 2
    assert found["runs"][0]["output_tokens"] == 6
    assert printed.err.count("goodput") == 2


def prefix_hits(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    found = re.search(r"^halyard_prefix_cache_hits_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found.group(1))


def test_a_run_does_not_find_its_prompts_in_the_prefix_cache_from_the_one_before(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", "serve", "--url", url, "--workload", "single", "--concurrency", "1", "1"]
    shifts = iter([3, 4])
    monkeypatch.setattr(secrets, "randbelow", lambda _: next(shifts))
    before = prefix_hits(url)
    assert main([*arguments, "--vocab-size", "500"]) == 0
    assert prefix_hits(url) == before
    monkeypatch.setattr(secrets, "randbelow", lambda _: 4)
    assert main([*arguments[:-1], "--vocab-size", "500"]) == 0
    assert prefix_hits(url) >= before + 112  # so it would have been noticed


def test_goals_and_percentiles_of_made_up_timings() -> None:
    quick = Timing(0.0, [0.1, 0.2, 0.3], 3, 0.3)
    slow = Timing(0.0, [1.0, 1.5], 2, 1.5)
    lost = Timing(0.0, error="gone")
    run = LoadRun(None, 3, 2.0, (quick, slow, lost))
    found = summary(run, Goal(ttft=0.5, tpot=0.2))
    assert (found["requests_per_second"], found["goodput_requests_per_second"]) == (1.0, 0.5)
    assert found["tpot"]["max"] == pytest.approx(0.5)
    assert found["ttft"]["p50"] == pytest.approx(0.55)
    assert found["output_tokens_per_second"] == 2.5
    assert found["tokens_per_event"] == 1.0
    assert "this client" not in _line(found)
    assert "this client worked 97% of the time" in _line(found | {"client_busy": 0.97})


def test_tokens_without_text_count_when_their_ids_are_asked_for(url: str) -> None:
    requests = [WorkloadRequest((5, 6), 12)]
    done = asyncio.run(run_load(url, "embedded", requests, token_ids=True))
    (timing,) = done.timings
    assert timing.error is None
    assert timing.num_tokens == 12
    assert len(timing.tokens) <= 12


@given(
    texts=st.lists(st.text("ab\r\n :", max_size=12), max_size=6),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    reads=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    chunked=st.booleans(),
)
def test_events_are_found_however_they_are_cut(
    texts: list[str], sizes: list[int], reads: list[int], chunked: bool
) -> None:
    words = [json.dumps(text).encode() for text in texts]
    body = b": hello\n\n" + b"".join(b"data: " + word + b"\n\n" for word in words)
    sent = body
    if chunked:
        pieces = cut(body, sizes)
        sent = b"".join(b"%x;x=y\r\n%b\r\n" % (len(one), one) for one in pieces) + b"0\r\n\r\n"
    reader = StreamReader(chunked)
    found = [event for piece in cut(sent, reads) for event in reader.feed(piece)]
    assert found == words
    assert reader.ended == chunked
    assert reader.rest == b""


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, at = [], 0
    while at < len(data):
        pieces.append(data[at : at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
    return pieces


def test_what_is_no_stream_is_an_error() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        StreamReader(True).feed(b"no number\r\n")
    with pytest.raises(ValueError, match="chunks"):
        StreamReader(True).feed(b"1" * 2000)


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    """So is one with an error in the middle, or with something that is no event."""

    async def play(answer: bytes) -> Timing:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}}")
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + answer)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            done = await run_load(f"http://127.0.0.1:{port}", "m", REQUESTS[:1])
        return done.timings[0]

    token = b'data: {"choices": [{"text": "x"}]}\n\n'
    for answer, wanted in (
        (token, "ValueError: the answer broke off"),
        (token + b'data: {"error": {"message": "no"}}\n\n', "ValueError: {'message': 'no'}"),
        (token + b"data: {\n\n", "ValueError: an event can't be read"),
        (token + b"data: [DONE]\n\n", ""),
    ):
        timing = asyncio.run(play(answer))
        assert len(timing.tokens) == 1
        assert (timing.error or "").startswith(wanted)
        assert timing.done == (not wanted)
