"""Every parameter that docs/api.md calls honoured changes what reaches the engine or the answer.

What a change means is tested where its parameter belongs; here none may be forgotten or read in vain.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import LetterTokenizer, ScriptedEngine
from served import Served

from halyard.runtime.request import Request

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "hi"}]
OPEN = [*HI, {"role": "assistant", "content": "So"}]  # an answer to go on with
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS = [{"type": "function", **FUNCTION}]
CLAUDE_TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
# What the engine says: a thought, a call in Hermes' form, and one more.
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
SCRIPT = f"<think>hm</think>x\n{CALL}\n{CALL}"
FORMS = {
    "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a+"},
    "guided_json": {"type": "null"}, "guided_regex": "a+", "guided_choice": ["a", "b"],
    "guided_grammar": 'root ::= "a"',
}  # fmt: skip

# A value for each parameter, and what else the body then needs, with and without it.
SHARED: dict[str, Any] = {
    "model": "nobody",
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"7": 3},
    "n": 2,
    "seed": 4,
    "stop": "x",
    "stream": True,
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "repetition_penalty": 1.5,
    "stop_token_ids": [120],
    "ignore_eos": True,
    "min_tokens": 3,
    "skip_special_tokens": False,
    "include_stop_str_in_output": (True, {"stop": "x"}),
    "prompt_logprobs": 1,
    "priority": 5,
    "cache_salt": "s",
    "timeout": 1e-9,
    "return_token_ids": True,
    "truncate_prompt_tokens": 2,
    "max_tokens": 3,
    **FORMS,
    "guided_finish": True,
}
CHATS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "ho"}],
    "tools": TOOLS,
    "tool_choice": ("none", {"tools": TOOLS}),
    "parallel_tool_calls": (False, {"tools": TOOLS}),
    "chat_template_kwargs": {"a": 1},
}
VALUES: dict[str, dict[str, Any]] = {
    CHAT: SHARED | CHATS | {
        "max_completion_tokens": 3,
        "logprobs": True,
        "top_logprobs": (2, {"logprobs": True}),
        "return_tokens_as_token_ids": (True, {"logprobs": True}),
        "add_generation_prompt": False,
        "continue_final_message": (True, {"messages": OPEN, "add_generation_prompt": False}),
        "modalities": ["audio"],
        "include_reasoning": False,
        "reasoning_effort": "low",
    },
    TEXT: SHARED | {
        "prompt": "other",
        "echo": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": (True, {"logprobs": 1}),
        "best_of": 3,
        "add_special_tokens": False,
    },
    RESPONSES: {
        **{name: SHARED[name] for name in (
            "model", "temperature", "top_p", "stream", "top_k", "min_p", "repetition_penalty",
            "seed", "stop", "priority", "cache_salt", "timeout", "guided_finish")},
        "input": "ho",
        "instructions": "Be.",
        "previous_response_id": "resp_0",
        "max_output_tokens": 3,
        "text": {"format": {"type": "json_object"}},
        "tools": FLAT_TOOLS,
        "tool_choice": ("none", {"tools": FLAT_TOOLS}),
        "parallel_tool_calls": (False, {"tools": FLAT_TOOLS}),
        "reasoning": {"effort": "low"},
        "background": True,
        "store": False,
        "truncation": "middle",
        "chat_template_kwargs": {"a": 1},
    },
    MESSAGES: {
        "messages": [{"role": "user", "content": "ho"}],
        "model": "nobody",
        "system": "Be.",
        "tools": CLAUDE_TOOLS,
        "tool_choice": ({"type": "none"}, {"tools": CLAUDE_TOOLS}),
        "thinking": {"type": "disabled"},
        "max_tokens": 3,
        "stop_sequences": ["x"],
        "stream": True,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.5,
    },
    COUNT: {
        "messages": [{"role": "user", "content": "hello"}],
        "model": "nobody",
        "system": "Be.",
        "tools": CLAUDE_TOOLS,
        "tool_choice": ({"type": "none"}, {"tools": CLAUDE_TOOLS}),
        "thinking": {"type": "disabled"},
    },
    "/tokenize": {
        "model": "nobody",
        "prompt": "other",
        "messages": ([{"role": "user", "content": "ho"}], {"prompt": None, "messages": HI}),
        "add_special_tokens": False,
        "return_token_strs": True,
        "add_generation_prompt": (False, {"prompt": None, "messages": HI}),
        "continue_final_message": (
            True, {"prompt": None, "messages": OPEN, "add_generation_prompt": False}),
        "chat_template_kwargs": ({"a": 1}, {"prompt": None, "messages": HI}),
        "tools": (TOOLS, {"prompt": None, "messages": HI}),
    },
    "/detokenize": {"tokens": [105], "model": "nobody"},
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "hi there"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": HI, "max_tokens": 100},
    COUNT: {"messages": HI},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
}


class Noting(ScriptedEngine):
    """Keeps what reaches the engine."""

    def __init__(self) -> None:
        super().__init__(SCRIPT)
        self.reached: list[Any] = []

    def add(self, request: Request) -> None:
        kept = {field.name: getattr(request, field.name) for field in fields(Request)}
        for name in ("request_id", "arrival_time", "seed"):
            del kept[name]
        self.reached.append(kept)
        super().add(request)


class Marking(LetterTokenizer):
    """Knows tools and thoughts, and writes a mark before a text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + super().encode(text)

    def apply_chat_template(self, messages: Any, *arguments: Any, **options: Any) -> list[int]:
        told = super().apply_chat_template(messages, *arguments, **options)
        return told + [ord(char) for char in repr(sorted(options.items()))]


@pytest.fixture
def noting(serve_engine: Callable[..., Served]) -> Served:
    tokenizer = Marking("{{ tools }} <tool_call> <think></think>")
    return serve_engine(Noting(), tokenizer=tokenizer)


def effect(noting: Served, path: str, body: dict[str, Any]) -> Any:
    """What a request does, without what differs each time."""
    assert isinstance(noting.engine, Noting)
    noting.engine.reached.clear()
    answer = noting.post(path, **body)
    text = re.sub(r"(chatcmpl|cmpl|resp|msg|call|fc|rs|toolu|req)[-_][0-9a-f]+", r"\1", answer.text)
    text = re.sub(r'"(created|created_at|completed_at)":[ \d.]+', r'"\1":0', text)
    noting.until(lambda: not noting.engine.running)
    return answer.status_code, text, list(noting.engine.reached)


def honoured(path: str) -> list[str]:
    table = PAGE.partition(f"## POST {path}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \| honoured", table, re.MULTILINE)


@pytest.mark.parametrize("path", VALUES)
def test_what_is_honoured_has_an_effect(noting: Served, path: str) -> None:
    assert set(honoured(path)) == set(VALUES[path])
    plain: dict[str, Any] = {}
    vain = []
    for name, value in VALUES[path].items():
        value, more = value if isinstance(value, tuple) else (value, {})
        body = BODIES[path] | more
        if str(more) not in plain:
            plain[str(more)] = effect(noting, path, body)
            assert effect(noting, path, body) == plain[str(more)]  # it is the same each time
        if effect(noting, path, body | {name: value}) == plain[str(more)]:
            vain.append(name)
    assert vain == []
