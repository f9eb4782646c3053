"""Raw sockets: slow senders, readers that take nothing, smuggled and malformed requests."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Served
from keyed_server import keyed_server
from scripted_engine import EOS, ScriptedEngine

from halyard.api.connections import ConnectionLimits, protocol_of
from halyard.runtime import client as clients
from halyard.runtime.intake import Intake, Limits

QUICK = ConnectionLimits(
    head_seconds=1.0, body_seconds=0.6, body_bytes_per_second=1000, stall_seconds=0.4,
    max_connections=8,
)  # fmt: skip


@pytest.fixture
def served(serve_engine: Callable[..., Served]) -> Served:
    return serve_engine(ScriptedEngine(), protocol=protocol_of(QUICK))


def connect(served: Served, receive: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive is not None:  # before it is connected, or the window is agreed on already
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    made.settimeout(5)
    made.connect(("127.0.0.1", served.port))
    return made


def read_all(sock: socket.socket) -> bytes:
    told = b""
    while True:
        try:
            piece = sock.recv(65536)
        except ConnectionResetError:
            return told
        if not piece:
            return told
        told += piece


def read_until(sock: socket.socket, end: bytes) -> None:
    """However many pieces an answer comes in."""
    told = b""
    while end not in told:
        piece = sock.recv(4096)
        assert piece, f"the connection ended: {told!r}"
        told += piece


def drip(sock: socket.socket, piece: bytes, seconds: float = 3.0) -> float:
    """Send it again and again until the other end has had enough; for how long that went on."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        try:
            sock.sendall(piece)
            time.sleep(0.05)
            sock.setblocking(False)
            try:
                if sock.recv(4096) == b"":
                    break
            except BlockingIOError:
                pass
            finally:
                sock.settimeout(5)
        except (ConnectionError, TimeoutError):
            break
    return time.monotonic() - started


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


def ask(served: Served, request: bytes) -> bytes:
    """The answer to raw bytes; the connection is closed after it."""
    with closing(connect(served)) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def hostile() -> Iterator[tuple[str, bytes]]:
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    hidden = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    yield (
        "both lengths",
        post + b"content-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + hidden,
    )
    yield "two lengths", post + b"content-length: 0\r\ncontent-length: 44\r\n\r\n" + hidden
    yield "a list of lengths", post + b"content-length: 0, 44\r\n\r\n" + hidden
    yield "a signed length", post + b"content-length: +0\r\n\r\n" + hidden
    yield "a negative length", post + b"content-length: -1\r\n\r\n" + hidden
    yield "an obscure encoding", post + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + hidden
    yield "two encodings", post + b"transfer-encoding: identity, chunked\r\n\r\n0\r\n\r\n" + hidden
    yield "a space before the colon", post + b"content-length : 5\r\n\r\nabcde" + hidden
    yield "a bare line feed in a value", post + b"x-request-id: a\nx-evil: 1\r\n\r\n"
    yield "a null in a value", post + b"x-request-id: a\0b\r\n\r\n" + hidden
    yield "a bad chunk", post + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + hidden
    yield "a head of 100 KB", post + b"x: " + b"y" * 100_000 + b"\r\n\r\n"
    yield "20000 headers", post + b"a: b\r\n" * 20_000 + b"\r\n"
    yield "no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200
    yield "no host", b"GET /v1/models HTTP/1.1\r\n\r\n"
    yield "two hosts", b"GET /v1/models HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n"
    yield (
        "an old version's chunks",
        (b"POST /v1/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + hidden),
    )
    yield (
        "two headers of encodings",
        (
            post
            + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            + hidden
        ),
    )
    yield (
        "an encoding and an upgrade",
        (
            post
            + b"connection: upgrade\r\nupgrade: h2c\r\ntransfer-encoding: xchunked\r\n\r\n"
            + hidden
        ),
    )
    yield (
        "a bad chunk and an upgrade",
        (
            post
            + b"connection: upgrade\r\nupgrade: h2c\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
            + hidden
        ),
    )
    yield "a long path", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"
    yield "a proxy's request", b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n"
    yield "another protocol", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "a method of nonsense", b"YOGA / HTTP/1.1\r\nhost: x\r\n\r\n"
    yield "no path", b"GET http://x:y/ HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("what", "request_bytes"), hostile(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_hostile_framing_hides_no_request(served: Served, what: str, request_bytes: bytes) -> None:
    told = ask(served, request_bytes)
    assert told == b"" or told.startswith(b"HTTP/1.1 4"), told[:200]
    assert told.count(b"HTTP/1.1 ") <= 1, "a hidden request was answered"
    assert b"x-evil" not in told.lower().split(b"\r\n\r\n")[0]
    assert served.http.get("/health").status_code == 200


def completion(prompt: str, head: bytes = b"", **more: Any) -> bytes:
    asked = {"model": "letters", "prompt": prompt, "max_tokens": 2, **more}
    body = json.dumps(asked).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head +
        b"content-length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip


LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def told_for(served: Served, *pieces: bytes) -> bytes:
    """All that is answered, to its end, to bytes that come in pieces."""
    with closing(connect(served)) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.1)
        return read_all(sock)


@pytest.mark.parametrize("cut", [0, 20, 150, 180, -1])
@pytest.mark.parametrize("chunked", [False, True])
def test_who_would_rather_speak_http2_is_answered(served: Served, cut: int, chunked: bool) -> None:
    """As Java's HttpClient asks over plain HTTP: with a body behind the question."""
    upgrade = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
    request = completion("a", upgrade)
    if chunked:
        head, body = request.split(b"\r\n\r\n")
        head = head[: head.index(b"content-length")] + b"transfer-encoding: chunked"
        request = head + b"\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\nx-late: 1\r\n\r\n"
    whole = request + completion("b") + LAST
    told = told_for(served, whole[:cut], whole[cut:]) if cut else told_for(served, whole)
    assert told.count(b"HTTP/1.1 200 OK") == 3, told
    assert told.count(b'"text":"He"') == 2, told


def test_requests_sent_at_once_are_answered_in_turn(served: Served) -> None:
    told = told_for(served, completion("a") + completion("b", stream=True) + LAST)
    assert told.count(b"HTTP/1.1 200 OK") == 3
    assert told.index(b'"text":"He"') < told.index(b"[DONE]") < told.index(b'"ok"')
    # A hundred at once are too many: the first ones are answered, and nothing is answered by halves.
    told = told_for(served, completion("a") * 100)
    assert 0 < told.count(b"HTTP/1.1 200 OK") < 100
    assert told.count(b'"text":"He"') == told.count(b"HTTP/1.1 200 OK")
    assert served.until(lambda: served.host.num_requests == 0)


def test_nonsense_behind_a_request_leaves_its_answer_whole(served: Served) -> None:
    for nonsense in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100):
        for request in (completion("a"), completion("a", stream=True)):
            for pieces in ((request + nonsense,), (request, nonsense)):
                told = told_for(served, *pieces)
                assert told.startswith(b"HTTP/1.1 200 OK"), told
                assert b'"text":"H' in told, told
                assert told.count(b"HTTP/1.1 ") <= 2, told
                if b"event-stream" in told:
                    assert b"[DONE]\n\n\r\n0\r\n\r\n" in told, told
    assert served.until(lambda: served.host.num_requests == 0)


def test_nonsense_behind_a_request_does_not_cut_its_answer_later(
    serve_engine: Callable[..., Served],
) -> None:
    served = serve_engine(ScriptedEngine(pause=0.2), protocol=protocol_of(QUICK))
    told = told_for(served, completion("a", stream=True, max_tokens=9) + b"nonsense\r\n\r\n")
    assert b"[DONE]\n\n\r\n0\r\n\r\n" in told, told


def test_what_no_request_is_gets_a_reason(served: Served) -> None:
    told = ask(served, b"GET /v1/models HTTP/1.1\r\n\r\n")
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert "one host header" in error["message"]
    assert len(ask(served, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")) < 1000


def test_empty_lines_are_no_request(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with closing(connect(served)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        read_until(sock, b'"ok"')
        assert drip(sock, b"\r\n", 8) < 6
    assert "no whole request head came" in caplog.text


def test_headers_behind_a_body_are_nobodys(served: Served) -> None:
    body = json.dumps({"model": "letters", "prompt": "a", "max_tokens": 2}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        b"%x\r\n%b\r\n0\r\nx-request-id: late\r\nauthorization: Bearer x\r\n\r\n"
        % (len(body), body)
    )
    told = told_for(served, request + LAST)
    assert told.count(b"HTTP/1.1 200 OK") == 2
    assert b"late" not in told


def test_an_old_clients_connection_is_closed(served: Served) -> None:
    with closing(connect(served)) as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 200 OK")


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
