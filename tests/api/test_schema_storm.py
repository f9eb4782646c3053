"""200 random JSON schemas at temperature 1: every answer that ends parses and validates."""

from __future__ import annotations

import json
import random
import resource
import time
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="structured output needs llguidance")
pytest.importorskip("jsonschema", reason="validates what was written")

import jsonschema

from halyard.hal.errors import HalyardError, RequestError
from halyard.runtime.guided import TOO_COMPLEX
from halyard.runtime.llm import LLM
from halyard.runtime.request import Constraint, SamplingParams

PATTERNS = ("^[a-f]{1,4}$", "^(yes|no)$", "^[0-9]{2}-[0-9]{2}$", "^x+y{1,2}$")
FORMATS = ("date", "time", "uuid", "ipv4")


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A bounded schema: nested, enums, patterns, formats, arrays, unions."""
    kinds = ["integer", "boolean", "null", "enum", "pattern", "format", "string", "const"]
    if depth < 3:
        kinds += ["object", "array", "object", "anyOf"]
    match rng.choice(kinds):
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "enum":
            return {"enum": rng.sample(["red", 'a"b', 7, None, True, "gr\\ün"], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["fixed", 3, None, [1, 2]])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case "format":
            return {"type": "string", "format": rng.choice(FORMATS)}
        case "string":
            low = rng.randint(0, 3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}
        case "array":
            low = rng.randint(0, 2)
            return {"type": "array", "items": schema(rng, depth + 1), "minItems": low,
                    "maxItems": low + rng.randint(0, 2)}  # fmt: skip
        case "object":
            names = rng.sample(["a", "b", "name", "größe", "x y", "$ref_"], rng.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: schema(rng, depth + 1) for name in names},
                "required": [name for name in names if rng.random() < 0.7],
                "additionalProperties": False,
            }
        case "anyOf":
            return {"anyOf": [schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
        case kind:
            return {"type": kind}


def recursive(rng: random.Random) -> dict[str, Any]:
    """A list of nodes, through a reference to itself."""
    node = {
        "type": "object",
        "properties": {
            "v": schema(rng, 3),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def test_every_answer_validates() -> None:
    rng = random.Random(11)
    schemas = [recursive(rng) if n % 10 == 0 else schema(rng) for n in range(200)]
    params = [
        SamplingParams(
            guided=Constraint.json_schema(one), temperature=1.0, seed=number, max_tokens=160
        )
        for number, one in enumerate(schemas)
    ]
    with LLM("embedded", backend="cpu", kv_blocks=600, host_kv_blocks=0, max_model_len=256,
             max_num_sequences=32) as llm:  # fmt: skip
        outputs = llm.generate([f"a{n} = " for n in range(200)], params, use_tqdm=False)
    ended = 0
    for one, output in zip(schemas, outputs, strict=True):
        answer = output.outputs[0]
        if answer.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(answer.text), one)
        else:
            assert answer.finish_reason == "length"
    assert ended >= 180  # the others were cut off by max_tokens


HOSTILE = {
    "repeats of repeats": Constraint.regex("((a{1000}){1000}){1000}"),
    "pattern in a schema": Constraint.json_schema({"type": "string", "pattern": "((a{999}){999}){999}"}),
    "nested quantifiers": Constraint.regex("(x+x+)+y"),
    "counting": Constraint.regex("(a|b)*a(a|b){18}"),
    "many properties": Constraint.json_schema(
        {"properties": {f"p{n}": {"type": "string"} for n in range(1900)}}),
    "huge enum": Constraint.json_schema({"enum": ["v" * 20 + str(n) for n in range(3900)]}),
    "products of unions": Constraint.json_schema({"allOf": [
        {"anyOf": [{"properties": {f"k{i}{j}": {"type": "string"}}} for j in range(4)]}
        for i in range(12)]}),
    "deep": Constraint.json_schema(
        json.dumps({"items": {}}).replace("{}", '{"items": ' * 200 + "{}" + "}" * 200)),
    "long array": Constraint.json_schema({"type": "array", "minItems": 10**6}),
    "ambiguous grammar": Constraint.grammar('start: start start | "a" | start start start'),
    "empty loop": Constraint.grammar('start: x*\nx: y*\ny: "a"*'),
}  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(
        "embedded", backend="reference", kv_blocks=32, host_kv_blocks=0, max_model_len=96
    ) as llm:
        yield llm


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_cost_little(llm: LLM, name: str) -> None:
    """Refused or served, compiled within a second of processor time and 200 MB."""
    params = SamplingParams(guided=HOSTILE[name], max_tokens=4, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    refused = None
    try:
        llm.engine.intake.guidance(params)
        llm.generate(["x"], params, use_tqdm=False)
    except RequestError as error:
        refused = error.param
    except HalyardError as error:  # it grew while it ran: that request alone fails
        assert TOO_COMPLEX in str(error)  # noqa: PT017
    assert time.thread_time() - started < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert refused in (None, "guided")
