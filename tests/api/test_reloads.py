"""POST /admin/reload where something goes wrong: a mirror that was touched, engines that die meanwhile,
and an old model that can't be loaded any more either."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_process import LiveProcess, until
from serve_process import ROOT

from halyard.api.batch_run import AT_ONCE
from halyard.api.cli.main import main

WEIGHTS = "model.safetensors"


def mirrored(root: Path, name: str, **config: Any) -> None:
    """The embedded model under another name, with some settings of its own."""
    folder = root / "from" / name
    folder.mkdir(parents=True)
    for path in (ROOT / "models" / "embedded").iterdir():
        if path.suffix in (".json", ".safetensors", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    own = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(own))
    assert main(["models", "mirror", str(folder), "--mirror", str(root / "mirror")]) == 0


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reloads")
    mirrored(root, "old", version=1)
    mirrored(root, "new", version=2)
    mirrored(root, "short", max_position_embeddings=64)  # found out while it is loaded
    return root / "mirror"


@pytest.fixture(scope="module")
def live(mirror: Path) -> Iterator[LiveProcess]:
    server = LiveProcess("old", "--mirror", str(mirror), "--require-verified", "--enable-admin",
                         "--max-model-len", "512", "--max-restarts", "100")  # fmt: skip
    yield server
    server.close()


@pytest.fixture
def touched() -> Iterator[Callable[[Path], None]]:
    """Changes one bit of a file, until the test is over."""
    files: list[Path] = []

    def flip(path: Path) -> None:
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)

    def touch(path: Path) -> None:
        flip(path)
        files.append(path)

    touch.undo = lambda: [flip(files.pop()) for _ in list(files)]  # type: ignore[attr-defined]
    yield touch
    touch.undo()  # type: ignore[attr-defined]


def fingerprint(live: LiveProcess) -> str:
    answer = live.ask(5)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["system_fingerprint"])


def test_a_reload_takes_from_the_mirror_only_what_it_verifies(
    live: LiveProcess, mirror: Path, touched: Callable[[Path], None], tmp_path: Path
) -> None:
    old, pid = fingerprint(live), live.engines()
    touched(mirror / "new" / WEIGHTS)
    for mode in ("beside", "in_place"):
        refused = live.admin("reload", model="new", mode=mode)
        assert refused.status_code == 400, refused.text
        told = refused.json()["error"]["message"]
        assert WEIGHTS in told
        assert len(set(re.findall(r"[0-9a-f]{64}", told))) == 2
    plain = tmp_path / "plain"
    shutil.copytree(mirror / "new", plain, ignore=shutil.ignore_patterns("halyard-manifest.json"))
    for model, why in (("nobody", "no model 'nobody' in the mirror"), (str(plain), "can't be verified"),
                       ("../from/new", "no such model folder")):  # fmt: skip
        refused = live.admin("reload", model=model, mode="in_place")
        assert refused.status_code == 400, refused.text
        assert why in refused.json()["error"]["message"]
    touched.undo()  # type: ignore[attr-defined]
    refused = live.admin("reload", model="new", mode="in_place", manifest_digest="0" * 64)
    assert "0" * 64 in refused.json()["error"]["message"]
    assert "nobody was not loaded: no model 'nobody' in the mirror" in live.stderr
    assert (fingerprint(live), live.engines()) == (old, pid)  # none of it cost anything
    own = json.loads((mirror / "new" / "halyard-manifest.json").read_text())
    digests = {WEIGHTS: own["files"][WEIGHTS]["sha256"]}
    done = live.admin("reload", model="new", mode="beside", digests=digests)
    assert done.status_code == 200, done.text
    new = fingerprint(live)
    assert new == done.json()["fingerprint"] != old
    facts = live.http.get(f"/v1/provenance/{new}").json()
    assert facts["model"]["files"][WEIGHTS] == f"sha256:{digests[WEIGHTS]}"
    until(lambda: len(live.engines()) == 1)


def test_neither_model_can_be_loaded_in_place(
    live: LiveProcess, mirror: Path, touched: Callable[[Path], None]
) -> None:
    """The caller hears what was wrong with the new one; the old one comes back when it can."""
    old = fingerprint(live)
    touched(mirror / "new" / WEIGHTS)
    failed = live.admin("reload", model="short", mode="in_place")
    assert failed.status_code == 400, failed.text
    assert "64" in failed.json()["error"]["message"]
    told = live.ready()
    assert (told.status_code, told.json()["state"]) == (503, "restarting")
    assert WEIGHTS in told.json()["reason"]
    refused = live.ask(5)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    busy = live.admin("reload", model="old")
    assert busy.status_code == 409
    assert live.http.get("/health").status_code == 200
    touched.undo()  # type: ignore[attr-defined]
    until(lambda: live.ready().status_code == 200)
    assert fingerprint(live) == old
    assert len(live.engines()) == 1
    assert live.metric("halyard_load_failures_total") >= 2


def test_a_request_wakes_it_as_soon_as_it_can_be_loaded(
    live: LiveProcess, mirror: Path, touched: Callable[[Path], None]
) -> None:
    assert live.admin("sleep", level=2, wake_on_request=True).status_code == 200
    touched(mirror / "new" / WEIGHTS)
    assert live.ask(5).status_code == 503  # it waited for a start that failed
    assert live.http.get("/status").json()["state"] == "asleep"
    touched.undo()  # type: ignore[attr-defined]
    assert live.ask(5).status_code == 200


@pytest.mark.parametrize(
    ("mode", "model", "late"),
    [("beside", "old", "restarted"), ("beside", "new", "reloaded"), ("in_place", "old", "")],
)
def test_an_engine_that_dies_while_another_takes_its_place(
    live: LiveProcess, mode: str, model: str, late: str
) -> None:
    """The new one serves, and none of those that were started meanwhile is left or takes over again."""
    before = fingerprint(live)
    answers: list[httpx.Response] = []
    reloads: list[httpx.Response] = []
    long = threading.Thread(target=lambda: answers.append(live.ask(7, 400)))
    reload = threading.Thread(
        target=lambda: reloads.append(live.admin("reload", model=model, mode=mode))
    )
    [engine] = live.engines()
    os.kill(engine, signal.SIGSTOP)  # so that it has a request, and is there when the reload begins
    long.start()
    until(lambda: live.metric("halyard_requests_waiting") == 1)
    reload.start()
    if mode == "beside":  # two load now: whichever comes last must not decide
        until(lambda: len(live.engines()) == 2)
        (reloaded,) = set(live.engines()) - {engine}
        if late == "reloaded":
            os.kill(reloaded, signal.SIGSTOP)
        os.kill(engine, signal.SIGKILL)
        until(lambda: bool(set(live.engines()) - {engine, reloaded}))
        (restarted,) = set(live.engines()) - {engine, reloaded}
        if late == "restarted":
            os.kill(restarted, signal.SIGSTOP)
            until(lambda: bool(reloads))
            os.kill(restarted, signal.SIGCONT)
        else:
            until(lambda: live.ready().status_code == 200)
            os.kill(reloaded, signal.SIGCONT)
    else:
        until(lambda: held(live))
        os.kill(engine, signal.SIGKILL)
        while reload.is_alive():  # there may be no memory for two
            assert len(live.engines()) <= 1
            time.sleep(0.02)
    for thread in (long, reload):
        thread.join(120)
    assert answers[0].status_code == 503
    assert reloads[0].status_code == 200, reloads[0].text
    until(lambda: live.ready().status_code == 200 and len(live.engines()) == 1)
    assert fingerprint(live) == reloads[0].json()["fingerprint"] != before
    assert "was killed" in live.stderr
    assert not re.search(r"was killed.*\[req-", live.stderr)  # no request's doing


def held(live: LiveProcess) -> bool:
    """Whether requests wait at the gate."""
    try:
        live.http.get("/v1/models", timeout=0.3)
    except httpx.ReadTimeout:
        return True
    return False


def test_requests_that_sleep_ends_are_told_to_come_again(live: LiveProcess) -> None:
    answers: list[httpx.Response] = []
    long = threading.Thread(target=lambda: answers.append(live.ask(7, 400)))
    [engine] = live.engines()
    os.kill(engine, signal.SIGSTOP)
    long.start()
    until(lambda: live.metric("halyard_requests_waiting") == 1)
    asleep = threading.Thread(target=lambda: live.admin("sleep", level=1, grace_seconds=0.2))
    asleep.start()
    long.join(60)
    os.kill(engine, signal.SIGCONT)
    asleep.join(60)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "engine_dead"
    assert answers[0].headers["retry-after"]
    assert "sleep" in answers[0].json()["error"]["message"]
    assert live.admin("wake").status_code == 200
    assert fingerprint(live)


def batch_of(live: LiveProcess, count: int, tokens: int) -> str:
    lines = [
        {"custom_id": f"line-{first}", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": [first], "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
                  "return_token_ids": True}}
        for first in range(10, 10 + count)
    ]  # fmt: skip
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = live.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in", content)})
    made = live.http.post("/v1/batches", json={
        "input_file_id": file.json()["id"], "endpoint": "/v1/completions",
        "completion_window": "24h"})  # fmt: skip
    return str(made.json()["id"])


def completed(live: LiveProcess, batch: str) -> int:
    return int(live.http.get(f"/v1/batches/{batch}").json()["request_counts"]["completed"])


def answers_of(live: LiveProcess, batch: str) -> list[dict[str, Any]]:
    """Once it is over."""
    until(lambda: live.http.get(f"/v1/batches/{batch}").json()["status"] == "completed")
    file = live.http.get(f"/v1/batches/{batch}").json()["output_file_id"]
    return [json.loads(one) for one in live.http.get(f"/v1/files/{file}/content").text.splitlines()]


def check_lines(answers: list[dict[str, Any]], count: int, tokens: int) -> set[str]:
    """Each line was answered once, with what its own prompt gives. The fingerprints of them all."""
    numbers = range(10, 10 + count)
    assert sorted(one["custom_id"] for one in answers) == sorted(f"line-{n}" for n in numbers)
    for one in answers:
        first = int(one["custom_id"].removeprefix("line-"))
        assert one["response"]["status_code"] == 200, one
        (choice,) = one["response"]["body"]["choices"]
        assert choice["token_ids"] == list(range(first + 1, first + 1 + tokens))
    return {one["response"]["body"]["system_fingerprint"] for one in answers}


def other_than_served(live: LiveProcess, mirror: Path) -> str:
    """The one of two models that isn't served."""
    facts = live.http.get(f"/v1/provenance/{fingerprint(live)}").json()
    own = json.loads((mirror / "new" / "halyard-manifest.json").read_text())["files"]
    served = facts["model"]["files"]["config.json"]
    return "old" if served == f"sha256:{own['config.json']['sha256']}" else "new"


def test_a_batch_goes_on_while_its_model_is_replaced(live: LiveProcess, mirror: Path) -> None:
    """What the old engine has begun it ends, and the new one answers the rest."""
    old, [engine] = fingerprint(live), live.engines()
    model = other_than_served(live, mirror)
    count, tokens = 600, 100
    batch = batch_of(live, count, tokens)
    until(lambda: completed(live, batch) >= 1)
    os.kill(engine, signal.SIGSTOP)  # it has lines, and keeps them until the other serves
    done = completed(live, batch)
    assert done + AT_ONCE < count
    reload = live.admin("reload", model=model, mode="beside")
    assert reload.status_code == 200, reload.text
    assert done <= completed(live, batch) < count
    os.kill(engine, signal.SIGCONT)
    answers = answers_of(live, batch)
    assert check_lines(answers, count, tokens) == {old, reload.json()["fingerprint"]}
    until(lambda: len(live.engines()) == 1)


def test_an_exchange_in_place_waits_for_no_batch(live: LiveProcess, mirror: Path) -> None:
    """What runs comes to its end; the lines behind it wait for the new engine."""
    old, [engine] = fingerprint(live), live.engines()
    model = other_than_served(live, mirror)
    count, tokens = 600, 100
    batch = batch_of(live, count, tokens)
    until(lambda: completed(live, batch) >= 1)
    os.kill(engine, signal.SIGSTOP)
    assert completed(live, batch) + AT_ONCE < count
    reloads: list[httpx.Response] = []
    reload = threading.Thread(
        target=lambda: reloads.append(live.admin("reload", model=model, mode="in_place"))
    )
    reload.start()
    until(lambda: held(live))
    os.kill(engine, signal.SIGCONT)
    reload.join(120)
    assert reloads[0].status_code == 200, reloads[0].text
    answers = answers_of(live, batch)
    assert check_lines(answers, count, tokens) == {old, reloads[0].json()["fingerprint"]}
    until(lambda: len(live.engines()) == 1)


@pytest.mark.parametrize("what", ["killed", "asleep"])
def test_a_batch_waits_while_there_is_no_engine(live: LiveProcess, what: str) -> None:
    """No line is answered with an error that only says: come again."""
    count, tokens = 600, 100
    [engine] = live.engines()
    batch = batch_of(live, count, tokens)
    until(lambda: completed(live, batch) >= 1)
    if what == "killed":
        os.kill(engine, signal.SIGSTOP)
        assert completed(live, batch) + AT_ONCE < count
        os.kill(engine, signal.SIGKILL)
    else:
        assert live.admin("sleep", level=1, grace_seconds=0.1).status_code == 200
        before = completed(live, batch)
        time.sleep(1)
        assert completed(live, batch) == before < count
        assert live.admin("wake").status_code == 200
    check_lines(answers_of(live, batch), count, tokens)
    until(lambda: len(live.engines()) == 1)


def test_what_an_engine_finishes_after_a_reload_is_counted(live: LiveProcess, mirror: Path) -> None:
    """Under its own model's name, and also what it did before stays there."""
    [engine] = live.engines()
    new = other_than_served(live, mirror)
    old = "old" if new == "new" else "new"
    finished = f'halyard_requests_total{{backend="null",finish_reason="length",model="{old}"'
    generated = f'halyard_generation_tokens_total{{backend="null",model="{old}"}}'
    before = live.metric(finished), live.metric(generated)
    assert min(before) > 0
    answers: list[httpx.Response] = []
    long = threading.Thread(target=lambda: answers.append(live.ask(7, 50)))
    os.kill(engine, signal.SIGSTOP)
    long.start()
    until(lambda: live.metric("halyard_requests_waiting") == 1)
    assert live.admin("reload", model=new, mode="beside").status_code == 200
    os.kill(engine, signal.SIGCONT)
    long.join(60)
    assert answers[0].status_code == 200, answers[0].text

    def seen() -> tuple[float, float]:
        return live.metric(finished), live.metric(generated)

    until(lambda: seen() == (before[0] + 1, before[1] + 50))
    until(lambda: len(live.engines()) == 1)
    assert seen() == (before[0] + 1, before[1] + 50)
