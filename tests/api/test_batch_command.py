"""A file of requests, offline: killed, gone on with, and refused where it is wrong."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, scripted_client

from halyard.api.batch_run import read_done, read_lines, run_lines
from halyard.api.cli.main import main
from halyard.api.host import EngineHost, Loaded
from halyard.hal.errors import ConfigError


def line(number: int, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    found = [json.loads(text) for text in path.read_text().splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one["response"] for one in found}


def run(source: Path, output: Path) -> None:
    async def work() -> None:
        host = EngineHost.of(Loaded(scripted_client(ScriptedEngine()), "thin air", "float32"))
        done = read_done(output)
        left = [one for one in read_lines(source) if one.custom_id not in done]
        with output.open("a") as file:
            await run_lines(host, left, file)
        await host.close(0.0)

    asyncio.run(work())


def test_every_endpoint_answers(tmp_path: Path) -> None:
    hi = [{"role": "user", "content": "hi"}]
    source = write(
        tmp_path / "in.jsonl",
        line(0, prompt="x", max_tokens=5),
        line(1, "/v1/chat/completions", messages=hi),
        line(2, "/v1/responses", input="hi"),
        line(3, prompt="x", temperature=-1),
        line(4, prompt="x", stream=True),
        line(5, prompt="x!"),
    )
    run(source, tmp_path / "out.jsonl")
    found = answers(tmp_path / "out.jsonl")
    assert found["r0"]["body"]["choices"][0]["text"] == "Hello"
    assert found["r1"]["body"]["choices"][0]["message"]["content"] == "Hello, wörld!"
    assert found["r2"]["body"]["status"] == "completed"
    codes = [found[f"r{number}"]["status_code"] for number in range(6)]
    assert codes == [200, 200, 200, 400, 400, 500]
    assert found["r3"]["body"]["error"]["param"] == "temperature"


def test_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(line(n, prompt="x") for n in range(5)))
    output = tmp_path / "out.jsonl"
    run(source, output)
    whole = output.read_text().splitlines(keepends=True)
    output.write_text(whole[0] + whole[1] + whole[2][:40])  # killed while it wrote
    before = output.read_text().splitlines()[:2]
    run(source, output)
    assert output.read_text().splitlines()[:2] == before  # not asked again
    assert set(answers(output)) == {f"r{n}" for n in range(5)}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"a": 1}], "line 1 needs a custom_id"),
        ([line(0, prompt="x"), line(0, prompt="x")], "line 2: custom_id 'r0' comes twice"),
        ([line(0, "/v1/images", prompt="x")], "url must be"),
        ([line(0) | {"body": 5}], "needs a body"),
        ([line(0) | {"method": "GET"}], "method must be POST"),
        ([[]], "must be a JSON object"),
        ([], "has no requests"),
    ],
)
def test_a_bad_input_is_refused_before_a_model_loads(
    tmp_path: Path, lines: list[Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", *lines)
    assert main(["batch", str(source), str(tmp_path / "out.jsonl")]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1


def test_an_output_of_something_else_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "notes.jsonl"
    other.write_text('{"no": "batch"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        read_done(other)
    assert other.read_text() == '{"no": "batch"}\n'


def test_a_process_that_is_killed_half_way_is_gone_on_with(tmp_path: Path) -> None:
    """SIGKILL while lines are answered; then every line is there once, and none was asked again."""
    count = 2000
    source = write(
        tmp_path / "in.jsonl",
        *(line(n, prompt=f"x{n} = ", max_tokens=8, ignore_eos=True) for n in range(count)),
    )
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "halyard.api.cli.main", "batch", str(source), str(output),
        "--backend", "null", "--kv-blocks", "64", "--max-num-sequences", "4",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(whole_lines(output)) < 200 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    before = whole_lines(output)
    assert 200 <= len(before) < count
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{count} requests: {len(before)} were there" in done.stderr
    assert whole_lines(output)[: len(before)] == before
    found = answers(output)  # each custom_id once
    assert set(found) == {f"r{n}" for n in range(count)}
    assert {one["status_code"] for one in found.values()} == {200}


def whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [one for one in path.read_text().splitlines(keepends=True) if one.endswith("\n")]


def test_the_command_with_the_embedded_model(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(line(n, prompt="x", max_tokens=3) for n in range(3)))
    output = tmp_path / "out.jsonl"
    arguments = ["batch", str(source), str(output), "--backend", "reference", "--kv-blocks", "64"]
    assert main(arguments) == 0
    assert {one["status_code"] for one in answers(output).values()} == {200}
    assert main(arguments) == 0  # nothing left to do
    assert len(answers(output)) == 3
