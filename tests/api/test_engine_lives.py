"""`halyard serve` while its engine dies, is exchanged, sleeps and wakes."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_process import LiveProcess, events, until
from serve_process import ROOT

EMBEDDED = ROOT / "models" / "embedded"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveProcess]:
    server = LiveProcess("--enable-admin", "--hang-seconds", "3")
    yield server
    server.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded model with another tokenizer file, so another fingerprint."""
    folder = tmp_path / "other"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "notes.txt").write_text("another version")
    return folder


def test_a_killed_engine_is_replaced_and_everybody_is_told(live: LiveProcess) -> None:
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


def test_a_hanging_engine_is_replaced(live: LiveProcess) -> None:
    os.kill(live.engines()[0], signal.SIGSTOP)
    answer = live.ask(5)
    assert answer.status_code == 503
    assert "hung" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
    until(lambda: live.ready().status_code == 200)
    assert live.ask(5).status_code == 200


@pytest.mark.parametrize("mode", ["beside", "in_place"])
def test_weights_rotate_under_load_and_no_answer_is_dropped_or_mixed(
    live: LiveProcess, copy: Path, mode: str
) -> None:
    target = str(copy) if mode == "beside" else "embedded"
    old = live.ask(5).json()["system_fingerprint"]
    restarts = live.metric("halyard_engine_restarts_total")
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
    assert live.metric("halyard_engine_restarts_total") == restarts  # the server's, not a model's


def test_what_cannot_be_loaded_leaves_the_old_model(live: LiveProcess, copy: Path) -> None:
    old, pid = live.ask(5).json()["system_fingerprint"], live.engines()
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
    assert live.engines() == pid  # in place too it was found out before the old one went


def test_sleep_frees_and_wake_serves_again(live: LiveProcess) -> None:
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
