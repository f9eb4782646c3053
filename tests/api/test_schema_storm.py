"""200 random JSON schemas at temperature 1, over HTTP: every answer parses and validates, 100 streams
at once say the same as whole answers. And what hostile constraints cost."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="structured output needs llguidance")
pytest.importorskip("jsonschema", reason="validates what was written")

import httpx
import jsonschema
from live_server import LiveServer, live_server

from halyard.hal.errors import HalyardError, RequestError
from halyard.runtime.llm import LLM
from halyard.runtime.masks import TOO_COMPLEX
from halyard.runtime.request import Constraint, SamplingParams

PATTERNS = ("^[a-f]{1,4}$", "^(yes|no)$", "^[0-9]{2}-[0-9]{2}$", "^x+y{1,2}$")
FORMATS = ("date", "time", "uuid", "ipv4")


TIME = re.compile(
    r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)", re.I
)
FORMATS_CHECKED = jsonschema.FormatChecker(FORMATS)


@FORMATS_CHECKED.checks("time")
def is_time(text: object) -> bool:
    """RFC 3339's; the library's own knows no fractions and offsets without another library."""
    return not isinstance(text, str) or bool(TIME.fullmatch(text))


@FORMATS_CHECKED.checks("date")
def is_date(text: object) -> bool:
    """RFC 3339's, which has a year 0; Python's own begins at 1."""
    try:
        return not isinstance(text, str) or bool(date.fromisoformat(text.replace("0000-", "2000-")))
    except ValueError:
        return False


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


SCHEMAS = 200
STREAMS = 100  # at once


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    engine = {"kv_blocks": 2000, "max_num_sequences": 64, "dtype": "float32"}
    with live_server("cpu", engine=engine) as server:
        yield server


async def ask(
    http: httpx.AsyncClient, number: int, asked: Any, *, stream: bool
) -> tuple[str, str | None]:
    """Text of an answer and why it ended."""
    schema_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": asked}}
    body = {
        "prompt": f"a{number} = ", "response_format": schema_format, "temperature": 1.0,
        "seed": number, "max_tokens": 150, "guided_finish": True, "stream": stream,
    }  # fmt: skip
    if not stream:
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, (asked, answer.text)
        (choice,) = answer.json()["choices"]
        return choice["text"], choice["finish_reason"]
    text, reason, last = "", None, ""
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, (asked, await answer.aread())
        async for line in answer.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    assert last == "data: [DONE]"
    return text, reason


async def ask_all(url: str, schemas: list[Any], *, stream: bool) -> list[tuple[str, str | None]]:
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        asked = [ask(http, number, one, stream=stream) for number, one in enumerate(schemas)]
        return await asyncio.gather(*asked)


def test_every_answer_validates_and_streams_are_the_same(live: LiveServer) -> None:
    rng = random.Random(11)
    schemas = [recursive(rng) if n % 10 == 0 else schema(rng) for n in range(SCHEMAS)]
    whole = asyncio.run(ask_all(live.url, schemas, stream=False))
    streamed = asyncio.run(ask_all(live.url, schemas, stream=True))
    # A list that refers to itself may go on as long as the model likes: it is led to its end.
    for one, (text, reason) in zip(schemas, whole, strict=True):
        assert reason == "stop", (one, text)
        jsonschema.validate(json.loads(text), one, format_checker=FORMATS_CHECKED)
    assert streamed == whole


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


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) << 10


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_cost_little(llm: LLM, name: str) -> None:
    """Refused or served, compiled within a second of processor time and 200 MB."""
    params = SamplingParams(guided=HOSTILE[name], max_tokens=4, seed=1)
    llm.engine.intake.guidance(SamplingParams(guided=Constraint.regex("a")))  # reads the vocabulary
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    started = time.thread_time()
    refused = None
    try:
        llm.engine.intake.guidance(params)
    except RequestError as error:
        refused = error.param
    seconds = time.thread_time() - started
    try:
        if refused is None:
            llm.generate(["x"], params, use_tqdm=False)
    except HalyardError as error:  # it grew while it ran: that request alone fails
        assert TOO_COMPLEX in str(error)  # noqa: PT017
    peak = memory("VmHWM") - before
    print(f"{name}: {seconds:.2f} s, {peak >> 20} MiB, {'refused' if refused else 'served'}")
    assert seconds < 1.0
    assert peak < 200e6
    assert refused in (None, "guided")


TOO_LARGE = {
    "values in a schema": (Constraint.json_schema({"enum": list(range(4100))}), "at most 4000 are taken"),
    "a schema's text": (Constraint.json_schema({"description": "x" * 140_000}), "at most 131072 are taken"),
    "a pattern": (Constraint.regex("a" * 17_000), "at most 16384 are taken"),
    "a grammar": (Constraint.grammar('start: "' + "a" * 17_000 + '"'), "at most 16384 are taken"),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_is_too_large_is_refused_before_it_is_compiled(llm: LLM, what: str) -> None:
    constraint, told = TOO_LARGE[what]
    with pytest.raises(RequestError, match=told):
        llm.engine.intake.guidance(SamplingParams(guided=constraint))
