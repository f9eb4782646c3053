"""Log lines name their request and hold no prompt; spans arrive at a collector on loopback."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine
from served import Served

from halyard.api import logs, traces
from halyard.api.logs import configure
from halyard.api.traces import open_traces
from halyard.hal.errors import ConfigError


@pytest.fixture
def lines() -> Iterator[Callable[..., Callable[[], list[str]]]]:
    """Sends log lines into memory: call it with a format, then read."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logs.access.level)

    def begin(form: str, **options: Any) -> Callable[[], list[str]]:
        stream = io.StringIO()
        configure(form, stream=stream, **options)
        return lambda: stream.getvalue().splitlines()

    yield begin
    root.handlers[:], level, access_level = before
    root.setLevel(level)
    logs.access.setLevel(access_level)


def test_json_lines_name_the_request_and_hold_no_prompt(
    serve_engine: Callable[..., Served], lines: Callable[..., Callable[[], list[str]]]
) -> None:
    read = lines("json", access_log=True)
    served = serve_engine(ScriptedEngine("ok"))
    named = {"x-request-id": "mine-7"}
    served.http.post("/v1/completions", json={"prompt": "a-secret-thought"}, headers=named)
    served.http.post("/v1/completions", json={"prompt": "a-secret-plan!"}, headers=named)
    served.http.get("/v1/models?key=a-secret-key")
    assert served.until(lambda: sum('"path": "/v1/models"' in line for line in read()) == 1)
    found = [json.loads(line) for line in read()]
    assert "a-secret" not in "".join(read())
    asked = [line for line in found if line.get("path") == "/v1/completions"]
    assert [line["status"] for line in asked] == [200, 500]
    assert all(line["request_id"] == "mine-7" for line in asked)
    assert all(line["seconds"] > 0 and line["client"] == "127.0.0.1" for line in asked)
    failed = next(line for line in found if line["level"] in ("warning", "error"))
    assert failed["request_id"] == "mine-7"
    assert "logits are NaN" in str(failed)


def test_text_lines_end_with_the_request(
    serve_engine: Callable[..., Served], lines: Callable[..., Callable[[], list[str]]]
) -> None:
    read = lines("text", access_log=True)
    served = serve_engine(ScriptedEngine("ok"))
    served.http.get("/version", headers={"x-request-id": "mine-8"})
    assert served.until(lambda: any("/version 200" in line for line in read()))
    assert next(line for line in read() if "/version" in line).endswith("[mine-8]")


def test_without_an_access_log_good_requests_say_nothing(
    serve_engine: Callable[..., Served], lines: Callable[..., Callable[[], list[str]]]
) -> None:
    read = lines("json")
    served = serve_engine(ScriptedEngine("ok"))
    served.post("/v1/completions", prompt="x")
    assert read() == []


def test_a_log_format_that_is_none() -> None:
    with pytest.raises(ConfigError, match="text or json"):
        configure("xml")


class Collector:
    """Takes OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                for part in proto.ExportTraceServiceRequest.FromString(body).resource_spans:
                    for fact in part.resource.attributes:
                        collector.resource[fact.key] = fact.value.string_value
                    for scope in part.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk.trace", reason="needs halyard[otel]")
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


def facts(span: Any) -> dict[str, Any]:
    found = {}
    for fact in span.attributes:
        kind = fact.value.WhichOneof("value")
        value = getattr(fact.value, kind)
        found[fact.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_a_request_is_a_tree_of_spans_below_the_clients_own(
    serve_engine: Callable[..., Served], collector: Collector
) -> None:
    served = serve_engine(ScriptedEngine("abc", pause=0.01), traces=open_traces(collector.url))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "mine-9"}
    served.http.post("/v1/completions", json={"prompt": ["hello", "you"]}, headers=headers)
    served.stop()
    (top,) = collector.named("POST /v1/completions")
    assert top.trace_id.hex() == trace
    assert top.parent_span_id.hex() == parent
    assert top.kind == 2  # server
    told = facts(top)
    assert told["halyard.request_id"] == "mine-9"
    assert told["http.response.status_code"] == 200
    assert told["gen_ai.request.model"] == "letters"
    assert collector.resource["service.name"] == "halyard"
    decodes = collector.named("decode")
    assert len(decodes) == 2  # one a prompt
    assert {facts(s)["gen_ai.usage.input_tokens"] for s in decodes} == {5, 3}
    for decode in decodes:
        told = facts(decode)
        assert told["gen_ai.usage.output_tokens"] == 4
        assert told["gen_ai.response.finish_reasons"] == ["stop"]
        (prefill,) = [s for s in collector.named("prefill")
                      if facts(s)["gen_ai.response.id"] == told["gen_ai.response.id"]]  # fmt: skip
        (queue,) = [s for s in collector.named("queue")
                    if facts(s)["gen_ai.response.id"] == told["gen_ai.response.id"]]  # fmt: skip
        assert all(s.parent_span_id == top.span_id for s in (queue, prefill, decode))
        assert all(s.trace_id == top.trace_id for s in (queue, prefill, decode))
        assert (
            top.start_time_unix_nano
            <= queue.start_time_unix_nano
            <= prefill.start_time_unix_nano
            <= decode.start_time_unix_nano
            <= decode.end_time_unix_nano
        )
        assert decode.end_time_unix_nano - decode.start_time_unix_nano > 20e6  # three steps
    assert "hello" not in str(collector.spans)  # no prompt leaves


def test_failures_and_clients_that_leave_are_errors(
    serve_engine: Callable[..., Served], collector: Collector
) -> None:
    watch = open_traces(collector.url)
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.02), traces=watch)
    served.post("/v1/completions", prompt="boom!")
    body = {"prompt": "go on", "stream": True, "max_tokens": 200}
    with suppress(httpx.HTTPError), served.http.stream("POST", "/v1/completions", json=body) as got:
        next(got.iter_lines())
    assert served.until(lambda: not served.engine.running)
    served.post("/v1/completions", prompt="x" * 300)
    served.stop()
    ends = [(s.status.code, facts(s).get("http.response.status_code"))
            for s in collector.named("POST /v1/completions")]  # fmt: skip
    assert sorted(ends) == [(0, 400), (2, 200), (2, 500)]
    reasons = sorted(r for s in collector.spans
                     for r in facts(s).get("gen_ai.response.finish_reasons", []))  # fmt: skip
    assert reasons == ["abort", "error"]
    assert watch is not None
    assert watch._watched == {}


def test_unsampled_parents_are_respected(
    serve_engine: Callable[..., Served], collector: Collector
) -> None:
    served = serve_engine(ScriptedEngine("ok"), traces=open_traces(collector.url))
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}
    served.http.post("/v1/completions", json={"prompt": "hello"}, headers=headers)
    served.stop()
    assert collector.named("POST /v1/completions") == []


def test_no_endpoint_no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in traces._ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert open_traces(None) is None


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(traces.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "halyard\[otel\]"'):
        open_traces("http://127.0.0.1:1")
