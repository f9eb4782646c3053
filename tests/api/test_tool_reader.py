"""Tool calls and thoughts out of text, however it is cut."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from halyard.api.answer_reader import AnswerReader, ReadingRules
from halyard.api.dialect import Dialect, ToolStyle

CALL = '{"name": "look_up", "arguments": {"city": "K\\"ö}ln {", "n": [1, {"a": 2}]}}'
ARGUMENTS = {"city": 'K"ö}ln {', "n": [1, {"a": 2}]}
LLAMA = CALL.replace("arguments", "parameters")
NAMES = frozenset({"look_up", "other"})


def read(
    style: ToolStyle | None, text: str, cuts: list[int], thinking: bool | None = None
) -> tuple[str, str, list[tuple[str, str]]]:
    """(thought, content, [(name, arguments)]) of a text cut at these places."""
    rules = ReadingRules(Dialect(style, True), thinking, NAMES if style else None)
    reader = AnswerReader(rules)
    thought = content = ""
    calls: list[list[str]] = []
    places = [0, *sorted(cuts), len(text)]
    for number, (start, end) in enumerate(itertools.pairwise(places)):
        piece = reader.push(text[start:end], number == len(places) - 2)
        thought += piece.thought
        content += piece.content
        for call in piece.calls:
            if call.call_id is not None:
                assert call.index == len(calls)
                calls.append([call.name or "", ""])
            calls[call.index][1] += call.arguments
    return thought, content, [(name, arguments) for name, arguments in calls]


CASES: list[tuple[ToolStyle, str, str, list[tuple[str, Any]]]] = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [("look_up", ARGUMENTS)]),
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "other", '
        '"arguments": {}}\n</tool_call>',
        "Let me see.",
        [("look_up", ARGUMENTS), ("other", {})],
    ),
    ("hermes", '<tool_call>\n{"arguments": {"a": 1}, "name": "other"}</tool_call>', "",
     [("other", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "other"}</tool_call>', "", [("other", {})]),
    ("hermes", "a < b and <tool is no tag ", "a < b and <tool is no tag ", []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", "",
     [("look_up", ARGUMENTS), ("look_up", ARGUMENTS)]),
    ("mistral", "Plain [text]", "Plain [text]", []),
    ("mistral-args", '[TOOL_CALLS]look_up[ARGS]{"a": {"b": 1}}[TOOL_CALLS]other[ARGS]{}', "",
     [("look_up", {"a": {"b": 1}}), ("other", {})]),
    ("llama", LLAMA, "", [("look_up", ARGUMENTS)]),
    ("llama", f"<|python_tag|>{LLAMA}; {LLAMA}", "",
     [("look_up", ARGUMENTS), ("look_up", ARGUMENTS)]),
    ("llama", "The answer is {5}.", "The answer is {5}.", []),
    ("llama", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
    ("llama", '{"a": [1]}', '{"a": [1]}', []),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_calls_are_found_however_the_text_is_cut(
    style: ToolStyle, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    rng = random.Random(1)
    every = list(range(1, len(text)))
    for cuts in ([], every, *(rng.sample(every, min(5, len(every))) for _ in range(20))):
        _, told, found = read(style, text, cuts)
        assert told == content
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_a_call_that_was_cut_off_keeps_what_there_is() -> None:
    text = '<tool_call>\n{"name": "other", "arguments": {"a": [1, 2'
    assert read("hermes", text, [9, 20]) == ("", "", [("other", '{"a": [1, 2')])
    text = '<tool_call>{"nam'
    assert read("hermes", text, [3]) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "started", "thought", "content"),
    [
        ("<think>\nWell, <b>\nso.\n</think>\n\nYes.", False, "Well, <b>\nso.", "Yes."),
        ("Well.\n</think>\nYes </think>", True, "Well.", "Yes </think>"),
        ("No thought <think>", False, "", "No thought <think>"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        ("<thi", False, "", "<thi"),
        ("  <think>a</think>b", False, "a", "b"),
    ],
)
def test_thoughts_are_split_off(text: str, started: bool, thought: str, content: str) -> None:
    for cuts in ([], list(range(1, len(text))), [3, 8], [len(text) - 2]):
        assert read(None, text, [c for c in cuts if 0 < c < len(text)], started) == (
            thought, content, []
        )  # fmt: skip


def test_a_call_after_a_thought() -> None:
    text = f"<think>hm <tool_call></think>\n\n<tool_call>\n{CALL}\n</tool_call>"
    for cuts in ([], list(range(1, len(text)))):
        thought, content, calls = read("hermes", text, cuts, False)
        assert (thought, content) == ("hm <tool_call>", "")
        assert [name for name, _ in calls] == ["look_up"]


def test_calls_beyond_the_limit_are_left_out() -> None:
    text = f"[TOOL_CALLS] [{CALL}, {CALL}]"
    reader = AnswerReader(ReadingRules(Dialect("mistral"), None, NAMES, most_calls=1))
    assert {call.index for call in reader.push(text, True).calls} == {0}
