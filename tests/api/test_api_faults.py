"""Everything that goes wrong gets the envelope and the right status, and frees what it held."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from scripted_engine import BlockedLoader, ScriptedEngine
from served import Served

TOOL = {"type": "function", "function": {"name": "f"}}
HI = [{"role": "user", "content": "hi"}]


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    assert "Traceback" not in answer.text
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "top_p": 2}, "top_p"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 9}, "n"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "best_of": 3, "n": 4}, "best_of"),
        ({"prompt": "x", "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "seed": 2**70}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", 5]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_bad_completions_name_the_field(served: Served, body: Any, param: str) -> None:
    error = refused(served.post("/v1/completions", **body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools[0]"),
        ({"messages": HI, "tools": [TOOL]}, "tools"),  # the template knows none
        ({"messages": HI, "tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"messages": HI, "response_format": {"type": "yaml"}}, "response_format"),
        ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": HI, "structured_outputs": {"yaml": 1}}, "structured_outputs.yaml"),
        ({"messages": HI, "structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
        ({"messages": HI, "guided_choice": []}, "guided_choice"),
        ({"messages": HI, "guided_json": "{"}, "guided_json"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": HI, "max_completion_tokens": -2}, "max_completion_tokens"),
        ({"messages": HI, "chat_template": "{{ x }}"}, "chat_template"),
        ({"messages": HI, "chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs"),
    ],
)
def test_bad_chats_name_the_field(served: Served, body: Any, param: str) -> None:
    error = refused(served.post("/v1/chat/completions", **body), 400)
    assert error["param"] == param


def test_a_prompt_longer_than_the_context_has_its_own_code(served: Served) -> None:
    error = refused(served.post("/v1/completions", prompt="x" * 300), 400)
    assert error["code"] == "context_length_exceeded"
    assert 'type="context_length_exceeded"} 1.0' in served.http.get("/metrics").text


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"[]", b"null", b"[" * 100_000])
def test_a_body_that_is_not_the_json_asked_for(served: Served, body: bytes) -> None:
    refused(served.http.post("/v1/completions", content=body), 400)


def test_one_bad_prompt_of_several_runs_none(served: Served) -> None:
    refused(served.post("/v1/completions", prompt=[[97], [10**9]]), 400)
    assert served.until(lambda: not served.engine.running)


def test_routing_errors_wear_the_envelope(served: Served) -> None:
    refused(served.http.get("/v1/nothing"), 404)
    refused(served.http.get("/v1/completions"), 405)
    error = refused(served.post("/v1/completions", model="gpt-4", prompt="x"), 404)
    assert error["code"] == "model_not_found"
    assert refused(served.http.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_a_body_too_large(serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine(), max_body_bytes=1000)
    assert served.post("/v1/completions", prompt="x" * 100).status_code == 200
    refused(served.post("/v1/completions", prompt="x" * 2000), 413)


def test_a_full_queue_answers_429(serve_engine: Callable[..., Served]) -> None:
    engine = ScriptedEngine(max_queue_len=1)
    served = serve_engine(engine)
    engine.num_waiting = 1
    answer = served.post("/v1/completions", prompt="x")
    assert refused(answer, 429)["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1


def test_more_prompts_than_the_queue_holds_are_no_case_for_later(
    serve_engine: Callable[..., Served],
) -> None:
    """Told to come again they would do so for ever; a batch did."""
    served = serve_engine(ScriptedEngine(max_queue_len=3))
    error = refused(served.post("/v1/completions", prompt=["a"] * 4), 400)
    assert (error["param"], "at most 3 prompts" in error["message"]) == ("prompt", True)
    assert served.post("/v1/completions", prompt=["a"] * 3).status_code == 200


def test_a_failed_request_leaves_others_alone(served: Served) -> None:
    error = refused(served.post("/v1/completions", prompt="x!"), 500)
    assert error["message"] == "logits are NaN"
    assert served.post("/v1/completions", prompt="x").status_code == 200


def test_an_error_in_a_stream_is_its_last_event(served: Served) -> None:
    answer = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "x!"}],
                         stream=True)  # fmt: skip
    *_, last = [line for line in answer.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"


def test_a_dead_engine_is_told_not_hidden(served: Served) -> None:
    refused(served.post("/v1/completions", prompt="x?"), 503)
    error = refused(served.post("/v1/completions", prompt="x"), 503)
    assert error["code"] == "engine_dead"
    assert served.http.get("/ready").status_code == 503
    assert served.http.get("/health").status_code == 200


def test_while_loading_only_health_is_fine(serve_engine: Callable[..., Served]) -> None:
    loader = BlockedLoader(ScriptedEngine(), ValueError("no such luck"))
    served = serve_engine(ScriptedEngine(), loader=loader, wait=False)
    assert served.until(lambda: "compiling" in served.http.get("/ready").text)
    assert served.http.get("/ready").status_code == 503
    assert served.http.get("/health").status_code == 200
    answer = served.post("/v1/completions", prompt="x")
    assert refused(answer, 503)["code"] == "not_ready"
    assert "retry-after" in answer.headers
    refused(served.http.get("/v1/models"), 503)
    counted = served.post("/v1/messages/count_tokens", model="letters", messages=HI)
    assert (counted.status_code, counted.json()["error"]["code"]) == (503, "not_ready")
    assert 'halyard_ready{backend="",model=""} 0' in served.http.get("/metrics").text
    assert served.http.get("/status").json()["reason"] == "loading: compiling"
    loader.go_on.set()
    assert served.until(lambda: "no such luck" in served.http.get("/ready").text)
    assert served.http.get("/health").status_code == 503  # whoever watches it should start it anew
    assert (
        'halyard_load_failures_total{backend="",model=""} 1.0' in served.http.get("/metrics").text
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_request_at_once(
    serve_engine: Callable[..., Served], stream: bool
) -> None:
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.05))
    body = json.dumps({"prompt": "a", "max_tokens": 200, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        if stream:
            assert b"data: " in raw.recv(65536) + raw.recv(65536)
        assert served.until(lambda: bool(served.engine.running))
    assert served.until(lambda: not served.engine.running, 2.0)  # the script takes 10 s
    assert served.engine.aborted
    assert served.host.num_requests == 0
    assert served.post("/v1/completions", prompt="b", max_tokens=1).status_code == 200


def test_deltas_are_not_held_back(serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine("abc", pause=0.2))
    with served.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "stream": True}
    ) as answer:
        lines = answer.iter_lines()
        assert '"a"' in next(lines)
        assert served.engine.running  # the rest is not even made
