"""The load client against a real server: counts, times, goals, failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import live_server

from halyard.api.cli.main import main
from halyard.api.load import Goal, LoadRun, Timing, run_load, summary
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
    assert nobody.timings[0].error is not None
    with pytest.raises(ConfigError, match="http://"):
        asyncio.run(run_load("https://somewhere", "embedded", REQUESTS))


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
