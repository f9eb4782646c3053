"""Anthropic's own client against a real port: answers of a script, and tools of the embedded model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("anthropic", reason="needs the anthropic client")

import anthropic
from live_server import LiveServer, live_server
from scripted_engine import LetterTokenizer, ScriptedEngine
from served import Served

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {
        "name": "get_weather",
        "description": "Weather",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"enum": ["Köln", "Oslo"]}},
            "required": ["city"],
        },
    }
]


def client(port: int) -> Any:
    return anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{port}", api_key="unused", max_retries=0, timeout=60
    )


def test_a_message(served: Served) -> None:
    with client(served.port) as sdk:
        answer = sdk.messages.create(model="letters", max_tokens=50, messages=HI, system="Be.")
    assert answer.content[0].text == "Hello, wörld!"
    assert answer.stop_reason == "end_turn"
    assert answer.role == "assistant"
    assert answer.id.startswith("msg_")
    prompt = len("system: Be.\nuser: hi\nassistant: ")
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == prompt
    assert answer.usage.output_tokens == 14


def test_a_streamed_message(served: Served) -> None:
    with client(served.port) as sdk:
        with sdk.messages.stream(model="letters", max_tokens=5, messages=HI) as stream:
            text = "".join(stream.text_stream)
            last = stream.get_final_message()
        assert text == "Hello"
        assert last.content[0].text == text
        assert last.stop_reason == "max_tokens"
        assert last.usage.output_tokens == 5


def test_stop_sequences(served: Served) -> None:
    with client(served.port) as sdk:
        answer = sdk.messages.create(
            model="letters", max_tokens=50, messages=HI, stop_sequences=[", "]
        )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", ", ")
    assert answer.content[0].text == "Hello"


def test_tokens_are_counted(served: Served) -> None:
    with client(served.port) as sdk:
        count = sdk.messages.count_tokens(model="letters", messages=HI)
    assert count.input_tokens == len("user: hi\nassistant: ")


def test_thoughts_and_calls_are_blocks(serve_engine: Callable[..., Served]) -> None:
    call = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    script = f"<think>\nhm\n</think>\n\nSee:\n<tool_call>\n{call}\n</tool_call>"
    tokenizer = LetterTokenizer("{{ tools }} <tool_call> </think>")
    served = serve_engine(ScriptedEngine(script), tokenizer=tokenizer)
    options: Any = {"model": "letters", "max_tokens": 150, "messages": HI, "tools": TOOLS}
    with client(served.port) as sdk:
        whole = sdk.messages.create(**options)
        with sdk.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
    for answer in (whole, streamed):
        thought, text, use = answer.content
        assert thought.thinking == "hm"
        assert text.text == "See:"
        assert (use.name, use.input) == ("get_weather", {"city": "Oslo"})
        assert answer.stop_reason == "tool_use"
    assert tokenizer.options["tools"][0]["function"]["name"] == "get_weather"


def test_a_conversation_with_a_result(served: Served) -> None:
    messages = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [
                {"type": "text", "text": "rain"}]},
            {"type": "text", "text": "So?"}]},
    ]  # fmt: skip
    with client(served.port) as sdk:
        count = sdk.messages.count_tokens(model="letters", messages=messages)
    text = "user: hi\nassistant: I look.\ntool: rain\nuser: So?\nassistant: "
    assert count.input_tokens == len(text)


def test_errors_are_the_sdk_s_own(served: Served) -> None:
    with client(served.port) as sdk:
        with pytest.raises(anthropic.NotFoundError) as missing:
            sdk.messages.create(model="claude", max_tokens=5, messages=HI)
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError) as wrong:
            sdk.messages.create(model="letters", max_tokens=0, messages=HI)
        assert wrong.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
        image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
        with pytest.raises(anthropic.BadRequestError, match="image"):
            sdk.messages.create(model="letters", max_tokens=5, messages=image)  # type: ignore[arg-type]
        bad = [{"role": "user", "content": "x!"}]
        with (
            pytest.raises(anthropic.APIError, match="NaN"),
            sdk.messages.stream(model="letters", max_tokens=5, messages=bad) as stream,  # type: ignore[arg-type]
        ):
            stream.get_final_message()


def result(content: object) -> list[dict[str, object]]:
    return [{"type": "tool_result", "tool_use_id": "t1", "content": content}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice"),
        ({"tool_choice": {"type": {}}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": result(5)}]}, "messages[0].content[0].content"),
        ({"messages": [{"role": "user", "content": result([5])}]}, "messages[0].content[0].content[0]"),
        ({"messages": [{"role": "user", "content": result({"a": 1})}]},
         "messages[0].content[0].content"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named(served: Served, body: dict[str, object], param: str) -> None:
    asked = {"model": "letters", "max_tokens": 5, "messages": HI} | body
    answer = served.http.post("/v1/messages", json=asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)


def test_async(served: Served) -> None:
    async def ask() -> str:
        async with anthropic.AsyncAnthropic(
            base_url=f"http://127.0.0.1:{served.port}", api_key="x"
        ) as sdk:
            answer = await sdk.messages.create(model="letters", max_tokens=5, messages=HI)
            return answer.content[0].text  # type: ignore[union-attr]

    assert asyncio.run(ask()) == "Hello"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    pytest.importorskip("llguidance", reason="forced calls need llguidance")
    with live_server("reference") as server:
        yield server


def test_a_forced_call_of_the_embedded_model(live: LiveServer) -> None:
    live.speak("hermes")
    with client(int(live.url.rsplit(":", 1)[1])) as sdk:
        answer = sdk.messages.create(
            model="embedded", max_tokens=120, messages=HI, tools=TOOLS,
            tool_choice={"type": "tool", "name": "get_weather"},
        )  # fmt: skip
    (use,) = answer.content
    assert use.type == "tool_use"
    assert use.input["city"] in ("Köln", "Oslo")
    assert answer.stop_reason == "tool_use"
