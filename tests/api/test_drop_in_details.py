"""Small things that programs written for OpenAI's or vLLM's servers rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import Served

HI = [{"role": "user", "content": "hi"}]
ENDPOINTS = [("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": HI})]


def chunks(served: Served, path: str, **body: Any) -> list[dict[str, Any]]:
    text = served.post(path, stream=True, **body).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_a_chunk_has_one_choice(served: Served, path: str, body: Any) -> None:
    """Many clients look at choices[0] alone, also where n is 3."""
    found = chunks(served, path, **body, n=3, max_tokens=2)
    assert {len(chunk["choices"]) for chunk in found} == {1}
    indices = [chunk["choices"][0]["index"] for chunk in found]
    assert set(indices) == {0, 1, 2}
    counted = chunks(served, path, **body, n=2, stream_options={"include_usage": True})
    assert counted[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in counted[:-1])


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_top_p_of_zero_is_the_most_likely_token(served: Served, path: str, body: Any) -> None:
    assert served.post(path, **body, top_p=0).status_code == 200
    assert served.post(path, **body, top_p=-0.1).json()["error"]["param"] == "top_p"


def test_no_alternatives_need_no_logprobs(served: Served) -> None:
    assert served.post("/v1/chat/completions", messages=HI, top_logprobs=0).status_code == 200
    refused = served.post("/v1/chat/completions", messages=HI, top_logprobs=1)
    assert refused.json()["error"]["param"] == "top_logprobs"


def test_an_answer_goes_back_into_the_conversation(served: Served) -> None:
    """As the SDK gives it, empty fields and refusals included."""
    said = [
        {"role": "assistant", "content": "Hello", "refusal": None, "annotations": [],
         "audio": None, "function_call": None, "tool_calls": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't"}]},
    ]  # fmt: skip
    for message in said:
        answer = served.post("/v1/chat/completions", messages=[*HI, message, *HI])
        assert answer.status_code == 200, answer.text


def test_too_long_a_conversation_blames_the_messages(served: Served) -> None:
    answer = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 999}])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "messages"


def test_tokens_named_by_their_ids(served: Served) -> None:
    asked = {"logprobs": 1, "return_tokens_as_token_ids": True, "max_tokens": 1}
    told = served.post("/v1/completions", prompt="x", **asked).json()["choices"][0]["logprobs"]
    assert told["tokens"] == [f"token_id:{ord('H')}"]
    assert list(told["top_logprobs"][0]) == told["tokens"]
    asked |= {"logprobs": True, "top_logprobs": 1}
    chat = served.post("/v1/chat/completions", messages=HI, **asked).json()["choices"][0]
    assert chat["logprobs"]["content"][0]["token"] == f"token_id:{ord('H')}"


def test_an_echo_is_of_what_was_read(served: Served) -> None:
    answer = served.post(
        "/v1/completions", prompt="abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1
    ).json()["choices"][0]
    assert answer["text"] == "efH"


@pytest.mark.parametrize("body", [
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a\\ud800"}', b'{"prompt": "\xff"}', b'{"prompt": ' + b"[" * 99999, b"", b"[]",
    b'"x"', b'{"prompt": "a", "seed": 99999999999999999999999}', b'{"prompt": "a", "n": 1e3}',
])  # fmt: skip
def test_bytes_that_are_no_request(served: Served, body: bytes) -> None:
    answer = served.http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_nul_is_a_character(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="a\0b", echo=True, max_tokens=1).json()
    assert answer["choices"][0]["text"] == "a\0bH"


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics"])
def test_whoever_watches_may_ask_for_the_head_alone(served: Served, path: str) -> None:
    """Load balancers and uptime checks do."""
    head, whole = served.http.head(path), served.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert served.http.head("/v1/chat/completions").status_code == 405
    assert served.http.get(path).content  # the connection goes on


def test_what_is_not_there_is_blamed_by_the_callers_word(served: Served) -> None:
    empty = served.post("/v1/responses", input=[])
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "input")
    batch = served.post(
        "/v1/batches", input_file_id="file-x", endpoint="/v1/completions", completion_window="24h"
    )
    assert (batch.status_code, batch.json()["error"]["param"]) == (404, "input_file_id")
