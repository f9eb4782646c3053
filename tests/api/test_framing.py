"""Raw sockets: where a request ends, what is none, and several at once on one connection."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from raw_sockets import (
    LAST,
    QUICK,
    ask,
    completion,
    connect,
    drip,
    read_all,
    read_until,
    told_for,
)
from scripted_engine import ScriptedEngine
from served import Served

from halyard.api.connections import protocol_of


@pytest.fixture
def served(serve_engine: Callable[..., Served]) -> Served:
    return serve_engine(ScriptedEngine(), protocol=protocol_of(QUICK))


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
