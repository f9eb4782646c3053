"""The responses API through the openai client, against a script on a real port."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the openai client")

import openai
from scripted_engine import LetterTokenizer, ScriptedEngine
from served import Served

from halyard.api.response_store import ResponseStore

TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
CALL = 'See:\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0, timeout=20
    )


def test_a_response(served: Served) -> None:
    with client(served) as sdk:
        answer = sdk.responses.create(model="letters", input="hi", instructions="Be.")
        assert answer.output_text == "Hello, wörld!"
        assert answer.status == "completed"
        assert answer.usage is not None
        assert answer.usage.input_tokens == len("system: Be.\nuser: hi\nassistant: ")
        assert answer.usage.input_tokens_details.cached_tokens == 2
        assert sdk.responses.retrieve(answer.id).output_text == answer.output_text
        items = sdk.responses.input_items.list(answer.id)
        assert items.data[0].role == "user"  # type: ignore[union-attr]
        sdk.responses.delete(answer.id)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(answer.id)


def test_a_conversation_goes_on(served: Served) -> None:
    with client(served) as sdk:
        first = sdk.responses.create(model="letters", input="hi", instructions="Be.")
        second = sdk.responses.create(
            model="letters", input="so", previous_response_id=first.id, max_output_tokens=5
        )
        assert second.output_text == "Hello"
        assert second.status == "incomplete"
        assert second.incomplete_details is not None
        assert second.incomplete_details.reason == "max_output_tokens"
        text = "user: hi\nassistant: Hello, wörld!\nuser: so\nassistant: "
        assert second.usage is not None
        assert second.usage.input_tokens == len(text)
        with pytest.raises(openai.NotFoundError) as missing:
            sdk.responses.create(model="letters", input="x", previous_response_id="resp_0")
        assert missing.value.param == "previous_response_id"
        unkept = sdk.responses.create(model="letters", input="hi", store=False)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(unkept.id)


def test_a_streamed_response(served: Served) -> None:
    with client(served) as sdk, sdk.responses.stream(model="letters", input="hi") as stream:
        events = list(stream)
        last = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == 1
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == last.output_text == "Hello, wörld!"


def test_calls_are_items(serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(
        ScriptedEngine(CALL), tokenizer=LetterTokenizer("{{ tools }} <tool_call>")
    )
    with client(served) as sdk:
        whole = sdk.responses.create(model="letters", input="hi", tools=[TOOL])
        with sdk.responses.stream(model="letters", input="hi", tools=[TOOL]) as stream:
            pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
            streamed = stream.get_final_response()
        for answer in (whole, streamed):
            assert answer.output_text == "See:"
            call = answer.output[1]
            assert call.type == "function_call"
            assert (call.name, call.arguments) == ("f", '{"a": 1}')
        assert "".join(pieces) == '{"a": 1}'
        after = sdk.responses.create(
            model="letters",
            previous_response_id=whole.id,
            tools=[TOOL],
            input=[{"type": "function_call_output", "call_id": "c", "output": "ok"}],
        )
        assert after.usage is not None
        assert after.usage.input_tokens == len("user: hi\nassistant: See:\ntool: ok\nassistant: ")


def test_one_in_the_background_is_cancelled(serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.05))
    with client(served) as sdk:
        answer = sdk.responses.create(model="letters", input="hi", background=True)
        assert answer.status == "in_progress"
        assert served.until(lambda: bool(served.engine.running))
        assert sdk.responses.cancel(answer.id).status == "cancelled"
        assert served.until(lambda: not served.engine.running)
        assert sdk.responses.retrieve(answer.id).status == "cancelled"


def test_one_in_the_background_is_fetched(served: Served) -> None:
    with client(served) as sdk:
        answer = sdk.responses.create(model="letters", input="hi", background=True)
        deadline = time.monotonic() + 10
        while answer.status == "in_progress" and time.monotonic() < deadline:
            answer = sdk.responses.retrieve(answer.id)
        assert answer.output_text == "Hello, wörld!"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"truncation": "middle"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True, "stream": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0]"),
        ({"input": "x" * 300}, "input"),
        ({"input": "x" * 1_000_000}, "input"),
        ({"instructions": "x" * 300}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(served: Served, options: Any, param: str) -> None:
    answer = served.post("/v1/responses", **{"input": "hi"} | options)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_store_is_bounded() -> None:
    store = ResponseStore(2)

    class Answers:
        def cancel(self) -> None:
            cancelled.append(1)

    cancelled: list[int] = []
    for number in range(4):
        store.put(str(number), type("S", (), {"answers": Answers(), "tenant": "default"})())
    assert len(cancelled) == 2
    store.get("3")
