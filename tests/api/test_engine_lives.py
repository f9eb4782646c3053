"""`halyard serve` while its engine dies, is exchanged, sleeps and wakes. On the null backend: an answer
counts on from its prompt's last token, so that each can be checked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_process import ROOT, ServeProcess

SMALL = ("--backend", "null", "--kv-blocks", "512", "--host-kv-blocks", "0")
EMBEDDED = ROOT / "models" / "embedded"


class Live(ServeProcess):
    """With a client."""

    def __init__(self, *arguments: str) -> None:
        super().__init__(*arguments, *SMALL)
        self.wait_for("Ready:")
        self.http = httpx.Client(base_url=self.url, timeout=300)

    def engines(self) -> list[int]:
        """Pids of the engine processes."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task").glob("*/children")
                for pid in pid.read_text().split()]  # fmt: skip

    def ask(self, first: int, count: int = 5, **more: Any) -> httpx.Response:
        body = {"prompt": [first], "max_tokens": count, "return_token_ids": True, "temperature": 0}
        return self.http.post("/v1/completions", json=body | {"ignore_eos": True} | more)

    def ready(self) -> httpx.Response:
        return self.http.get("/ready")

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def admin(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/admin/{path}", json=body)

    def close(self) -> None:
        self.http.close()
        assert self.stop() == 0
        assert "Traceback" not in self.stderr


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live("--enable-admin", "--hang-seconds", "3")
    yield server
    server.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded model with another tokenizer file, so another fingerprint."""
    folder = tmp_path / "other"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "notes.txt").write_text("another version")
    return folder


def until(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.2)


def events(server: Live, first: int, count: int) -> Iterator[dict[str, Any]]:
    body = {"prompt": [first], "max_tokens": count, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def test_a_killed_engine_is_replaced_and_everybody_is_told(live: Live) -> None:
    assert "libtorch" not in Path(f"/proc/{live.process.pid}/maps").read_text()
    before = live.metric("halyard_engine_restarts_total")
    stream = events(live, 100, 1900)
    next(stream)
    [engine] = live.engines()
    os.kill(engine, signal.SIGKILL)
    *_, last = stream
    assert "SIGKILL" in last["error"]["message"]
    assert last["error"]["code"] == "engine_dead"
    assert live.http.get("/health").status_code == 200
    refused = live.ask(5)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "not_ready"
    told = live.ready()
    assert told.status_code == 503
    assert "restarting" in told.json()["reason"]
    until(lambda: live.ready().status_code == 200)
    assert live.ask(5).status_code == 200
    assert live.metric("halyard_engine_restarts_total") == before + 1
    assert live.metric("halyard_kv_blocks_used") == 0


def test_a_hanging_engine_is_replaced(live: Live) -> None:
    os.kill(live.engines()[0], signal.SIGSTOP)
    answer = live.ask(5)
    assert answer.status_code == 503
    assert "hung" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
    until(lambda: live.ready().status_code == 200)
    assert live.ask(5).status_code == 200


@pytest.mark.parametrize("mode", ["beside", "in_place"])
def test_weights_rotate_under_load_and_no_answer_is_dropped_or_mixed(
    live: Live, copy: Path, mode: str
) -> None:
    target = str(copy) if mode == "beside" else "embedded"
    old = live.ask(5).json()["system_fingerprint"]
    seen: dict[str, int] = {}
    wrong: list[Any] = []
    stop = threading.Event()

    def load(number: int) -> None:
        first = 1000 * number
        while not stop.is_set():
            prints = set()
            for event in events(live, first, 200):
                if "error" in event:
                    wrong.append(event)
                prints.add(event.get("system_fingerprint"))
            if len(prints) != 1:
                wrong.append(prints)
            for one in prints:
                seen[str(one)] = seen.get(str(one), 0) + 1

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: bool(seen))
    answer = live.admin("reload", model=target, mode=mode)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    until(lambda: seen.get(told["fingerprint"], 0) > 4)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert told["mode"] == mode
    assert told["previous_fingerprint"] == old
    assert set(seen) == {old, told["fingerprint"]}
    for fingerprint in seen:
        assert live.http.get(f"/v1/provenance/{fingerprint}").status_code == 200
    until(lambda: len(live.engines()) == 1)
    assert live.http.get("/v1/models").json()["data"][0]["id"] == "embedded"  # as it was called


def test_what_cannot_be_loaded_leaves_the_old_model(live: Live, copy: Path) -> None:
    old = live.ask(5).json()["system_fingerprint"]
    weights = copy / "model.safetensors"
    other = {"model.safetensors": "sha256:" + "0" * 64}
    answer = live.admin("reload", model=str(copy), digests=other)
    assert answer.status_code == 400
    assert "0" * 64 in answer.json()["error"]["message"]
    weights.write_bytes(weights.read_bytes()[:-1000])
    for mode in ("beside", "in_place"):
        answer = live.admin("reload", model=str(copy), mode=mode)
        assert answer.status_code == 400, answer.text
        assert "cut short" in answer.json()["error"]["message"]
    answer = live.admin("reload", model=str(copy / "nowhere"))
    assert answer.status_code == 400
    assert "no such model folder" in answer.json()["error"]["message"]
    assert live.admin("reload", modell="x").status_code == 400
    assert live.ready().status_code == 200
    assert live.ask(5).json()["system_fingerprint"] == old
    assert len(live.engines()) == 1


def test_sleep_frees_and_wake_serves_again(live: Live) -> None:
    assert live.admin("wake").status_code == 409
    assert live.admin("sleep", level=1).json() == {"level": 1}
    refused = live.ask(5)
    assert refused.status_code == 503
    assert "asleep" in refused.json()["error"]["message"]
    assert live.ready().status_code == 503
    assert live.admin("sleep").status_code == 409
    assert live.admin("wake").status_code == 200
    assert live.ask(5).status_code == 200
    assert live.admin("sleep", level=2, wake_on_request=True).json() == {"level": 2}
    assert not live.engines()
    assert live.ask(5).status_code == 200  # it waited
    assert live.ready().status_code == 200
    assert live.metric("halyard_kv_blocks_used") == 0
