"""Answers of both completion endpoints, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from scripted_engine import ScriptedEngine
from served import Served

TEXT = "Hello, wörld!"


def events(served: Served, path: str, **body: Any) -> list[Any]:
    found = []
    with served.http.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                found.append(line[6:])
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]


def test_a_chat_is_answered(served: Served) -> None:
    answer = served.post(
        "/v1/chat/completions",
        model="letters",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    ).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    prompt = len("user: hi\nassistant: ")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(TEXT) + 1,
        "total_tokens": prompt + len(TEXT) + 1,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_a_chat_streams_role_text_reason_and_usage(served: Served) -> None:
    chunks = events(
        served,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        stream_options={"include_usage": True},
    )
    *body, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(TEXT) + 1
    assert all(chunk["usage"] is None for chunk in body)
    deltas = [chunk["choices"][0]["delta"] for chunk in body]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert len(body) > 5  # as it comes, not all at once
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in body]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}


def test_usage_is_absent_unless_asked_for(served: Served) -> None:
    chunks = events(served, "/v1/completions", prompt="x")
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [{}, {"include_usage": True}])
def test_events_of_text_alone_are_like_all_others(
    serve_engine: Callable[..., Served], path: str, usage: dict[str, bool]
) -> None:
    """They are written in a shorter way."""
    text = 'a"b\\c\n\x01</script>"text":""é猫🙂'
    served = serve_engine(ScriptedEngine(text, pause=0.005))
    asked: dict[str, Any] = {"max_tokens": 100, "stream_options": usage}
    asked |= (
        {"prompt": "x"} if "chat" not in path else {"messages": [{"role": "user", "content": "x"}]}
    )
    kinds = []
    for n in (1, 2):  # two answers take the long way
        told, found = "", set()
        for event in events(served, path, **asked, n=n):
            event |= {"id": "", "created": 0, "usage": event.get("usage", "none") and "some"}
            for choice in event["choices"]:
                holder = choice.get("delta", choice)
                name = "text" if holder is choice else "content"
                told += holder.get(name, "") if choice["index"] == 0 else ""
                if holder.get(name):
                    holder[name] = "some"
                choice["index"] = 0
            found.add(json.dumps(event))  # in the order in which it was written
        assert told == text
        kinds.append(found)
    assert kinds[0] == kinds[1]


def test_continuous_usage_grows(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(served, "/v1/completions", prompt="x", stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(served: Served, name: str) -> None:
    answer = served.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], **{name: 3}
    ).json()
    assert answer["choices"][0]["message"]["content"] == TEXT[:3]
    assert answer["choices"][0]["finish_reason"] == "length"


def test_chat_logprobs(served: Served) -> None:
    answer = served.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=9,
        logprobs=True,
        top_logprobs=2,
    ).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == TEXT[:9]
    assert content[8]["bytes"] == list("ö".encode())
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("ab", 1), (["ab", "c"], 2), ([97, 98], 1), ([[97, 98], [99]], 2)],
)
def test_every_kind_of_prompt(served: Served, prompt: object, count: int) -> None:
    answer = served.post("/v1/completions", prompt=prompt, echo=True, max_tokens=2, n=2).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["abHe", "abHe", "cHe", "cHe"][: 2 * count]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
    assert answer["usage"]["completion_tokens"] == 4 * count
    chunks = events(served, "/v1/completions", prompt=prompt, echo=True, max_tokens=2, n=2)
    streamed = ["" for _ in texts]
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_sixteen_tokens_are_the_default(serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine("x" * 50))
    answer = served.post("/v1/completions", prompt="a").json()
    assert answer["choices"][0]["text"] == "x" * 16


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_and_logprobs_give_the_likelihood_of_the_prompt(
    served: Served, max_tokens: int
) -> None:
    answer = served.post(
        "/v1/completions", prompt="abc", echo=True, logprobs=1, max_tokens=max_tokens
    ).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "abc" + TEXT[:max_tokens]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("abc" + TEXT[:max_tokens])
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5] + [-0.5] * max_tokens
    assert logprobs["top_logprobs"][:2] == [None, {"b": -0.5}]
    assert logprobs["text_offset"] == list(range(3 + max_tokens))
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_the_stop_string_is_cut_and_ends_the_engine_s_work(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="x", stop=["wör"]).json()
    assert answer["choices"][0]["text"] == "Hello, "
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == "wör"
    assert served.until(lambda: not served.engine.running)


def test_unknown_and_harmless_fields_are_ignored(served: Served) -> None:
    answer = served.post(
        "/v1/completions", prompt="x", user="me", metadata={"a": "b"}, store=True, best_of=1, blah=1,
        max_tokens=None, response_format={"type": "text"},
    )  # fmt: skip
    assert answer.status_code == 200


def test_token_ids_come_back_when_asked_for(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="x", max_tokens=2, return_token_ids=True).json()
    assert answer["choices"][0]["token_ids"] == [ord("H"), ord("e")]
    assert answer["choices"][0]["prompt_token_ids"] == [ord("x")]


def test_models_and_aliases(serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine(), names=("me/letters", "alias"))
    listed = served.http.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["me/letters", "alias"]
    assert served.http.get("/v1/models/me/letters").json()["root"] == "letters"
    assert served.http.get("/v1/models/letters").status_code == 404
    answer = served.post("/v1/completions", model="alias", prompt="x").json()
    assert answer["model"] == "alias"


def test_operators_routes(served: Served) -> None:
    http = served.http
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"ready": True, "state": "ready", "reason": "ready"}
    assert set(http.get("/version").json()) == {"version"}
    status = http.get("/status").json()
    assert status["kv_blocks_total"] == 100
    assert status["device"] == "thin air"
    served.post("/v1/completions", prompt="x")
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'finish_reason="stop"' in metrics.text
    paths = http.get("/schema").json()["paths"]
    assert "/v1/chat/completions" in paths
    assert http.get("/schema/openapi.yaml").status_code == 200


def test_the_page_brings_everything_along(served: Served) -> None:
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for path in ("/page/app.js", "/page/style.css"):
        assert path in page.text
        assert served.http.get(path).status_code == 200
    assert "https://" not in page.text  # nothing from elsewhere


def test_request_ids_come_back(served: Served) -> None:
    given = served.http.get("/health", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = served.http.get("/nowhere", headers={"X-Request-Id": "with space"})
    assert made.headers["x-request-id"].startswith("req-")
