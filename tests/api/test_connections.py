"""Raw sockets: slow senders, readers that take nothing, requests that are too much or never end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from keyed_server import keyed_server
from raw_sockets import QUICK, ask, connect, drip, read_all, read_until
from scripted_engine import EOS, ScriptedEngine
from served import Served

from halyard.api.connections import ConnectionLimits, protocol_of
from halyard.runtime import client as clients
from halyard.runtime.intake import Intake, Limits


@pytest.fixture
def served(serve_engine: Callable[..., Served]) -> Served:
    return serve_engine(ScriptedEngine(), protocol=protocol_of(QUICK))


def test_a_slow_head_is_not_waited_for(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with closing(connect(served)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        assert drip(sock, b"x", 8) < 6
    with closing(connect(served)) as sock:  # nor the second one of a connection
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        read_until(sock, b'"ok"')
        time.sleep(1.3)  # idle is no offence
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        read_until(sock, b'"ok"')
        sock.sendall(b"GET /hea")
        assert drip(sock, b"l", 8) < 6
    with closing(connect(served)) as sock:  # nor nothing at all
        started = time.monotonic()
        assert read_all(sock) == b""
        assert time.monotonic() - started < 6
    assert caplog.text.count("no whole request head came") == 3


def test_a_slow_body_is_not_waited_for(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"
    with closing(connect(served)) as sock:
        sock.sendall(head)
        assert drip(sock, b" ", 8) < 6
    assert "its request body came at" in caplog.text
    body = json.dumps({"model": "letters", "prompt": "a", "max_tokens": 2}).encode() + b" " * 3000
    with closing(connect(served)) as sock:  # a body that comes in good time is
        sock.sendall(head.replace(b"100000", str(len(body)).encode()))
        for start in range(0, len(body), 300):
            sock.sendall(body[start : start + 300])
            time.sleep(0.06)
        assert b"200 OK" in sock.recv(4096)
    assert served.http.get("/health").status_code == 200


def long_engine() -> ScriptedEngine:
    engine = ScriptedEngine("a" * 200_000)
    engine.intake = Intake(Limits(0x10000, 1 << 20, frozenset({EOS}), 8))
    return engine


def stream_unread(served: Served) -> socket.socket:
    body = json.dumps({"model": "letters", "prompt": "a", "max_tokens": 200_000, "stream": True,
                       "logprobs": 20}).encode()  # fmt: skip
    sock = connect(served, receive=4096)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_a_reader_that_takes_nothing_is_cut_off(
    serve_engine: Callable[..., Served], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(clients, "MAX_PENDING", 1 << 30)  # that is another reason, tested below
    served = serve_engine(long_engine(), protocol=protocol_of(QUICK))
    with closing(stream_unread(served)):
        assert served.until(lambda: len(served.engine.running) == 1)
        # Others go on meanwhile, and the engine is not held back.
        answer = served.post("/v1/completions", model="letters", prompt="b", max_tokens=3)
        assert answer.json()["choices"][0]["text"] == "aaa"
        assert served.until(lambda: not served.engine.running, 20)
    assert served.engine.aborted
    assert "its reader took nothing for 0.4 s" in caplog.text
    assert served.until(lambda: served.host.num_requests == 0)


def test_what_waits_for_a_slow_reader_is_bounded(
    serve_engine: Callable[..., Served], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(clients, "MAX_PENDING", 200)
    patient = ConnectionLimits(stall_seconds=60)
    served = serve_engine(long_engine(), protocol=protocol_of(patient))
    with closing(stream_unread(served)) as sock:
        assert served.until(lambda: "steps behind" in caplog.text, 20)
        assert served.until(lambda: not served.engine.running)
        told = read_all_slowly(sock)
    # Whoever reads on after all is told.
    assert b"read too slowly" in told
    assert "of tenant default was cut off: its reader is 200 steps behind" in caplog.text


def read_all_slowly(sock: socket.socket) -> bytes:
    told = b""
    while not told.endswith(b"0\r\n\r\n"):
        piece = sock.recv(65536)
        if not piece:
            break
        told += piece
    return told


def test_a_connection_too_many_is_refused(served: Served) -> None:
    idle = [connect(served) for _ in range(9)]
    try:
        with closing(connect(served)) as sock:
            told = read_all(sock)
        assert told.startswith(b"HTTP/1.1 503 ")
        head, _, body = told.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
        assert json.loads(body)["error"]["code"] == "connections_full"
    finally:
        for sock in idle:
            sock.close()
    assert served.until(
        lambda: ask(served, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")[:12] == b"HTTP/1.1 200"
    )


BOMBS: dict[str, str] = {
    "deep arrays": "[" * 200_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep in metadata": '{"prompt": "a", "metadata": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
    "deep in a schema": '{"prompt": "a", "guided_json": ' + '{"items":' * 50_000 + "{}" + "}" * 50_000 + "}",
    "a huge integer": '{"prompt": "a", "max_tokens": ' + "9" * 1_000_000 + "}",
    "a huge integer anywhere": '{"prompt": "a", "metadata": {"x": ' + "9" * 1_000_000 + "}}",
    "a huge token id": '{"prompt": [' + "9" * 100_000 + "]}",
    "a huge exponent": '{"prompt": "a", "temperature": 1e999999}',
    "not a number": '{"prompt": "a", "temperature": NaN}',
    "a lone surrogate": '{"prompt": "\\ud800"}',
    "a null byte": '{"prompt": "\\u0000", "model": "a\\u0000b"}',
    "many prompts": '{"prompt": [' + ",".join(['"a"'] * 300_000) + "]}",
    "many stop strings": '{"prompt": "a", "stop": [' + ",".join(['"a"'] * 300_000) + "]}",
    "many keys": '{"prompt": "a", "metadata": {' + ",".join(f'"k{n}": 0' for n in range(200_000)) + "}}",
    "a timeout of nonsense": '{"prompt": "a", "timeout": -1}',
    "a timeout without end": '{"prompt": "a", "timeout": 1e300}',
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_in_json_are_defused(served: Served, what: str) -> None:
    started = time.monotonic()
    for path in ("/v1/completions", "/v1/messages", "/v1/responses", "/tokenize"):
        answer = served.http.post(path, content=BOMBS[what].encode())
        assert answer.status_code < 500, (path, answer.text[:300])
        assert len(answer.content) < 20_000
    assert time.monotonic() - started < 20
    assert served.http.get("/ready").status_code == 200


def test_prompts_too_large_are_refused_before_they_are_tokenised(served: Served) -> None:
    tokenizer = served.host.client.tokenizer
    assert tokenizer is not None
    read: list[int] = []
    tokenizer.encode = lambda text, add_special_tokens=True: (read.append(len(text)), [65])[1]  # type: ignore[method-assign, assignment]
    long = "a" * 1_000_000
    asked = {"/v1/completions": {"prompt": long}, "/v1/chat/completions": {"messages": [{"role": "user", "content": long}]},
             "/v1/messages": {"max_tokens": 1, "messages": [{"role": "user", "content": long}]},
             "/v1/responses": {"input": long}}  # fmt: skip
    for path, body in asked.items():
        answer = served.post(path, model="letters", **body)
        assert answer.status_code == 400, path
        assert "can't fit in the context" in answer.json()["error"]["message"]
    assert read == []
    assert served.post("/v1/completions", prompt=["a"] * 2049).status_code == 400
    assert served.post("/v1/completions", prompt="a", stop=["a"] * 65).status_code == 400


def test_a_body_too_large_is_refused_on_every_post(
    serve_engine: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve_engine(ScriptedEngine(), max_body_bytes=10_000)
    paths = served.http.get("/schema/openapi.json").json()["paths"]
    posts = [path for path, item in paths.items() if "post" in item and "{" not in path]
    assert len(posts) >= 7
    for path in posts:
        if path == "/v1/files" or path.startswith("/admin"):
            continue  # a form: below; and what is off says so without reading
        answer = served.http.post(path, content=b'{"prompt": "' + b"a" * 20_000 + b'"}')
        assert answer.status_code == 413, path
        chunks = (b"a" * 1000 for _ in range(30))  # the same without saying how long it is
        answer = served.http.post(path, content=chunks)
        assert answer.status_code in (400, 413), path
    answer = served.http.post("/v1/files", data={"purpose": "batch"}, files={"file": b"x" * 20_000})
    assert answer.status_code == 413


def test_ids_lead_nowhere_else(serve_engine: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"status": "completed", "created_at": 1}')
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "facts.json").write_text('{"tenant": "acme", "created_at": 1}')
    (tmp_path / "secret" / "content").write_text("secret")
    keyed = keyed_server(serve_engine, tmp_path, data_dir=tmp_path / "data" / "here")
    keyed.served.http.headers["authorization"] = f"Bearer {keyed.keys['acme']}"
    ids = ["..%2f..%2fsecret", "..%2f..%2f..%2fsecret", "../../secret", "%2e%2e/%2e%2e/secret",
           "file-" + "0" * 24 + "%00", "%00", "a%0d%0ax-evil:%201", "..%5c..%5csecret", "%f0%9f%92%a3",
           "%c0%ae%c0%ae%2fsecret", "x" * 5000, "file-" + "0" * 24 + "%2f..%2f..%2f..%2fsecret"]  # fmt: skip
    for one in ids:
        for path in ("/v1/files/{}", "/v1/files/{}/content", "/v1/batches/{}", "/v1/responses/{}",
                     "/v1/models/{}", "/v1/provenance/{}", "/page/{}"):  # fmt: skip
            answer = keyed.served.http.get(path.format(one))
            assert answer.status_code in (400, 404, 405), (path, one, answer.status_code)
            assert "x-evil" not in answer.headers
            assert answer.text != "secret"
    for given in (b"a\tb", "ключ".encode(), b"x" * 200, b""):
        answer = keyed.served.http.get("/v1/models", headers=[(b"x-request-id", given)])
        assert answer.headers["x-request-id"].startswith("req-")


def test_deadlines(serve_engine: Callable[..., Served], tmp_path: Path) -> None:
    engine = ScriptedEngine("abcdefghij" * 20, pause=0.05)
    keyed = keyed_server(serve_engine, tmp_path, engine, request_timeout=5)

    def said(answer: Any) -> Any:
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def freed() -> bool:
        return keyed.served.until(
            lambda: not engine.running and keyed.served.host.num_requests == 0
        )

    for extra in ({"timeout": 0.6}, {"headers": {"x_request_timeout": "0.6"}}):
        started = time.monotonic()
        choice = said(keyed.ask("acme", max_tokens=200, **extra))
        assert time.monotonic() - started < 3
        assert choice["text"].startswith("abc")
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
        assert freed()
    whole = said(keyed.ask("acme", max_tokens=3, timeout=3))
    assert (whole["text"], whole["stop_reason"]) == ("abc", None)
    body = {
        "model": "letters",
        "messages": [{"role": "user", "content": "a"}],
        "stream": True,
        "timeout": 0.8,
    }
    events = keyed.call("acme", "POST", "/v1/chat/completions", body).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("length", "deadline")
    body = {"model": "letters", "max_tokens": 200, "messages": [{"role": "user", "content": "a"}]}
    message = keyed.call("acme", "POST", "/v1/messages", body, x_request_timeout="0.8").json()
    assert message["stop_reason"] == "max_tokens"
    body = {"model": "letters", "input": "a", "timeout": 1.0}
    assert keyed.call("acme", "POST", "/v1/responses", body).json()["status"] == "incomplete"
    for bad in ("0", "-1", "nan", "inf", "soon", "1e9"):
        assert keyed.ask("acme", headers={"x_request_timeout": bad}).status_code == 400
        assert (
            keyed.ask("acme", headers={"x_request_timeout": bad}).json()["error"]["param"]
            == "x-request-timeout"
        )
    # Nothing had begun: an error that clients don't try again by themselves.
    engine.pause = 1.0
    late = keyed.ask("acme", timeout=0.2)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert late.headers["x-should-retry"] == "false"
    assert freed()
