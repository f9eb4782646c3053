"""Structured output and tools through the openai client, on the embedded model at temperature 1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest

pytest.importorskip("llguidance", reason="structured output needs llguidance")
pytest.importorskip("openai", reason="needs the openai client")

import openai
from live_server import LiveServer, live_server
from pydantic import BaseModel

MODEL = "embedded"
HI: Any = [{"role": "user", "content": "What is the weather in Köln?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Köln", "Oslo"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
DIALECTS = ("hermes", "mistral", "mistral-args", "llama")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server


@pytest.fixture
def sdk(server: LiveServer) -> Iterator[Any]:
    server.client.tokenizer = server.plain
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as sdk:
        yield sdk


def test_three_guided_texts_in_one_stream(sdk: Any) -> None:
    """Each choice holds to the form by itself, and says what it says without a stream."""
    asked: Any = {
        "model": MODEL, "prompt": "x = ", "n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 40,
        "extra_body": {"guided_regex": "[0-9]{3}(\\.[0-9]{1,4})? # [a-z]{2,9}"},
    }  # fmt: skip
    texts, ends = ["", "", ""], [None, None, None]
    for chunk in sdk.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert ends == ["stop"] * 3
    assert all(re.fullmatch(r"[0-9]{3}(\.[0-9]{1,4})? # [a-z]{2,9}", text) for text in texts)
    assert len(set(texts)) > 1
    whole = sdk.completions.create(**asked).choices
    assert [choice.text for choice in sorted(whole, key=lambda one: one.index)] == texts


def check_calls(calls: Any) -> None:
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            assert set(arguments) == {"city", "days"}
            assert arguments["city"] in ("Köln", "Oslo")
            assert 1 <= arguments["days"] <= 9
        else:
            assert (call.function.name, arguments) == ("stop", {})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_required_calls_are_valid(server: LiveServer, sdk: Any, dialect: str) -> None:
    server.speak(dialect)
    answer = sdk.chat.completions.create(
        model=MODEL, messages=HI, tools=TOOLS, tool_choice="required", n=3, seed=4,
        max_tokens=500, parallel_tool_calls=False,
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert len(choice.message.tool_calls) == 1
        check_calls(choice.message.tool_calls)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_streamed_calls_equal_whole_ones(server: LiveServer, sdk: Any, dialect: str) -> None:
    server.speak(dialect)
    options: Any = {
        "model": MODEL, "messages": HI, "tools": TOOLS, "seed": 6, "max_tokens": 500,
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }  # fmt: skip
    (whole,) = sdk.chat.completions.create(**options).choices
    names, arguments, reasons = [], "", []
    pieces = 0
    for chunk in sdk.chat.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            if call.function.name:
                names.append(call.function.name)
                assert call.id
            arguments += call.function.arguments
            pieces += 1
        reasons.append(choice.finish_reason)
    (call,) = whole.message.tool_calls
    assert names == [call.function.name] == ["get_weather"]
    assert arguments == call.function.arguments
    assert pieces > 2
    assert reasons[-1] == "tool_calls"


def test_a_conversation_with_a_tool_s_answer(server: LiveServer, sdk: Any) -> None:
    server.speak("hermes")
    call = {"id": "c1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    answer = sdk.chat.completions.create(
        model=MODEL,
        messages=[*HI, {"role": "assistant", "content": None, "tool_calls": [call]},
                  {"role": "tool", "tool_call_id": "c1", "content": "rain"}],
        tools=TOOLS, max_tokens=5, temperature=0,
    )  # fmt: skip
    assert answer.usage.prompt_tokens > 50


def test_a_thought_comes_before_the_form(server: LiveServer, sdk: Any) -> None:
    server.speak("thinker")
    answer = sdk.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=60, seed=1,
        response_format={"type": "json_schema", "json_schema": {
            "name": "x", "strict": True, "schema": {"enum": ["a", "b"]}}},
        logit_bias={str(server.plain.encode("{")[0]): -100},
    )  # fmt: skip
    message = answer.choices[0].message
    if answer.choices[0].finish_reason == "stop":
        assert json.loads(message.content) in ("a", "b")


class Trip(BaseModel):
    city: Literal["Köln", "Oslo"]
    days: Literal[1, 2]
    stops: list[Literal["a", "b"]]


def test_parse_gives_an_object(sdk: Any) -> None:
    for seed in range(8):
        answer = sdk.chat.completions.parse(
            model=MODEL, messages=HI, response_format=Trip, max_tokens=150, seed=seed
        )
        if answer.choices[0].finish_reason == "stop":
            trip = answer.choices[0].message.parsed
            assert isinstance(trip, Trip)
            return
    pytest.fail("no answer came to its end")


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_regex": "[a-c]{4}"},
        {"guided_choice": ["abca", "bbbb"]},
        {"guided_grammar": 'root ::= "ab" [a-c] [a-c]'},
        {"structured_outputs": {"regex": "[a-c]{4}"}},
    ],
)
def test_extra_fields_hold_streamed_or_whole(sdk: Any, extra: Any) -> None:
    options: Any = {"model": MODEL, "prompt": "x", "max_tokens": 30, "seed": 2, "extra_body": extra}
    whole = sdk.completions.create(**options).choices[0].text
    streamed = "".join(c.choices[0].text for c in sdk.completions.create(**options, stream=True))
    assert streamed == whole
    assert len(whole) == 4
    assert set(whole) <= set("abc")


def test_a_schema_that_cannot_be_held_is_a_400(sdk: Any) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model=MODEL, messages=HI, response_format=bad)
    assert refused.value.param == "response_format"
