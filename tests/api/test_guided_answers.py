"""Answers held to a grammar, offline, on the embedded model at temperature 1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="structured output needs llguidance")

from halyard.hal.errors import RequestError
from halyard.runtime.llm import LLM
from halyard.runtime.request import Constraint, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        "embedded", backend="reference", kv_blocks=96, host_kv_blocks=0, max_model_len=512
    ) as llm:
        yield llm


def ask(llm: LLM, constraint: Constraint, prompt: str = "x = ", **params: Any) -> list[Any]:
    options: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0, "seed": 3} | params
    (output,) = llm.generate([prompt], SamplingParams(guided=constraint, **options), use_tqdm=False)
    return output.outputs


def test_json_of_a_schema_for_every_answer(llm: LLM) -> None:
    answers = ask(llm, Constraint.json_schema(PERSON), n=4)
    people = [json.loads(answer.text) for answer in answers]
    for person, answer in zip(people, answers, strict=True):
        assert answer.finish_reason == "stop"
        assert set(person) == {"name", "age", "tags"}
        assert 0 <= person["age"] <= 150
        assert len(person["name"]) <= 12
        assert set(person["tags"]) <= {"a", "b", "c"}
    assert len({answer.text for answer in answers}) > 1


def test_times_end_and_data_of_a_schema_stays_as_it_is(llm: LLM) -> None:
    for form, most in (("time", 26), ("date-time", 37)):  # with the quotes
        answers = ask(llm, Constraint.json_schema({"type": "string", "format": form}), n=3)
        assert all(one.finish_reason == "stop" and len(one.text) <= most for one in answers)
    fixed = {"format": "time"}
    (answer,) = ask(llm, Constraint.json_schema({"const": fixed}))
    assert json.loads(answer.text) == fixed


def test_the_same_constraint_serves_free_neighbours(llm: LLM) -> None:
    free = SamplingParams(max_tokens=8, temperature=0)
    alone = llm.generate(["import "], free, use_tqdm=False)[0].outputs[0].text
    held = SamplingParams(max_tokens=60, guided=Constraint.regex("[0-9]{5}"), seed=1)
    outputs = llm.generate(["import ", "y = "], [free, held], use_tqdm=False)
    assert outputs[0].outputs[0].text == alone
    assert re.fullmatch("[0-9]{5}", outputs[1].outputs[0].text)


def test_choices_and_grammars(llm: LLM) -> None:
    (answer,) = ask(llm, Constraint.choice(["yes", "no", 'per"haps']))
    assert answer.text in ("yes", "no", 'per"haps')
    (answer,) = ask(llm, Constraint.grammar('root ::= "a" ("b" | "c"){2} "!"'))
    assert re.fullmatch("a[bc]{2}!", answer.text)
    (answer,) = ask(llm, Constraint.grammar('start: "(" start ")" | "x"'))
    assert answer.text.count("(") == answer.text.count(")")


def test_greedy_answers_are_the_best_allowed_token(llm: LLM) -> None:
    (answer,) = ask(llm, Constraint.choice(["0", "1"]), temperature=0, logprobs=20)
    chosen = answer.token_ids[0]
    assert answer.text in ("0", "1")
    assert answer.logprobs[0][chosen].logprob < 0  # of the model's own distribution


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preempted_answers_go_on_in_their_grammar(mode: str) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 16}
    params = SamplingParams(
        guided=Constraint.json_schema(schema), max_tokens=90, temperature=1.0, seed=5
    )
    with LLM(
        "embedded",
        backend="cpu",
        kv_blocks=8,
        host_kv_blocks=64,
        max_model_len=112,
        preemption=mode,
    ) as llm:
        outputs = llm.generate([f"a{i} = " for i in range(3)], params, use_tqdm=False)
        stats = llm.engine.stats().scheduler
        assert stats.preemptions_swap + stats.preemptions_recompute > 0
    for output in outputs:
        text = output.outputs[0].text
        if output.outputs[0].finish_reason == "stop":
            assert 12 <= len(json.loads(text)) <= 16
        else:
            assert json.loads(text.rstrip("- ,\n") + "]")


def test_stop_strings_and_min_tokens_still_hold(llm: LLM) -> None:
    (answer,) = ask(llm, Constraint.regex("a{10}b"), stop="aaaa")
    assert answer.text == ""
    assert answer.stop_reason == "aaaa"
    (answer,) = ask(llm, Constraint.regex("[ab]{1,30}"), min_tokens=12, max_tokens=60)
    assert len(answer.token_ids) >= 12
    assert re.fullmatch("[ab]{1,30}", answer.text)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint("regex", "(a"), "unclosed"),
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("grammar", "start: nothing"), "nothing"),
        (Constraint("grammar", ""), "root"),
        (Constraint.json_schema({"type": "string", "minLength": 3, "maxLength": 1}), "minLength"),
        (Constraint.json_schema({"type": "nonsense"}), "nonsense"),
        (Constraint.json_schema({"not": {}}), "not"),
        (Constraint.json_schema({"$ref": "#"}), "no text satisfies"),
        (Constraint.json_schema({"$ref": "http://x.org/y"}), "x.org"),
        (Constraint.regex("x" * 20_000), "characters"),
        (Constraint.json_schema({"enum": [f"value {i}" for i in range(5000)]}), "values"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(
    llm: LLM, constraint: Constraint, words: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(words)) as refused:
        ask(llm, constraint)
    assert refused.value.param == "guided"


@pytest.mark.parametrize("schema", ["[", "[]", 5, False, {"a": {1}}])
def test_a_schema_that_is_none(schema: Any) -> None:
    with pytest.raises(RequestError) as refused:
        Constraint.json_schema(schema, "guided_json")
    assert refused.value.param == "guided_json"
