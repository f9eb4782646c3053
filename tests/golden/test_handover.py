"""A running sequence goes from backend to backend, between steps, and its tokens don't change.

Kernels differ in layout and blocks in size, so what travels is proven by what comes out: greedy and
drawn with a seed, from a prompt half computed to the last token, beside other requests, and with the
prefix cache of the engine that takes it over.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model

from halyard import LLM, SamplingParams
from halyard.hal.kernels.native.library import find_compiler

# name -> options; other block sizes on purpose.
ENGINES: dict[str, dict[str, Any]] = {"reference": {"backend": "reference", "block_size": 8}}
if find_compiler() is not None:
    ENGINES["cpu"] = {"backend": "cpu:native:eager", "block_size": 16}
    if find_spec("onnxruntime") is not None:
        ENGINES["onnx"] = {"backend": "onnx", "block_size": 32}
if find_spec("tvm") is not None:
    ENGINES["tvm"] = {"backend": "cpu:tvm:eager", "block_size": 64}

PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    "drawn": SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=24, ignore_eos=True),
}


NUMBERS = itertools.count()


def prompt(length: int) -> list[int]:
    generator = random.Random(length)
    return [generator.randrange(128) for _ in range(length)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LLM]]:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    with ExitStack() as stack:
        made = {}
        for name, options in ENGINES.items():
            made[name] = LLM(
                folder, dtype="float32", kv_blocks=1024 // options["block_size"],
                max_num_sequences=8, max_batched_tokens=16, max_model_len=128, **options,
            )  # fmt: skip
            stack.callback(made[name].close)
        yield made


@pytest.fixture(scope="module")
def undisturbed(engines: dict[str, LLM]) -> Any:
    """Tokens of a prompt that stays where it is, on the oracle."""
    known: dict[tuple[int, str], list[int]] = {}

    def ask(length: int, how: str) -> list[int]:
        if (length, how) not in known:
            llm = engines["reference"]
            (output,) = llm.generate([prompt(length)], PARAMS[how], use_tqdm=False)
            known[length, how] = list(output.outputs[0].token_ids)
        return known[length, how]

    return ask


def run_steps(llm: LLM, steps: int | None, request_id: str, into: list[int]) -> bool:
    """Step so often, or to the end; whether the request is done."""
    while llm.engine.has_work() and steps != 0:
        for event in llm.engine.step():
            if event.request_id == request_id:
                into.extend(event.token_ids)
                if event.finish_reason is not None:
                    return True
        llm.engine.check_integrity()
        steps = steps - 1 if steps is not None else None
    return False


def clean(llm: LLM) -> None:
    """Let the others end: nothing may be left behind."""
    while llm.engine.has_work():
        llm.engine.step()
    llm.engine.check_integrity()
    stats = llm.engine.stats().scheduler
    assert stats.blocks_used == 0
    assert stats.host_blocks_used == 0


def move(engines: dict[str, LLM], way: list[tuple[str, int]], length: int, how: str) -> list[int]:
    """Send a request along `way`: an engine's name and the steps that it does there."""
    found: list[int] = []
    first = engines[way[0][0]]
    request = first.engine.intake.request(
        prompt(length), PARAMS[how], request_id=f"moving-{next(NUMBERS)}"
    )
    first.engine.add(request)
    here = first
    for number, (name, steps) in enumerate(way):
        there = engines[name]
        if number:
            moving = here.engine.detach(request.request_id)
            here.engine.check_integrity()
            there.engine.attach(moving)
            there.engine.check_integrity()
        here = there
        if run_steps(here, steps, request.request_id, found):
            break
    else:
        run_steps(here, None, request.request_id, found)
    for llm in engines.values():
        clean(llm)
    return found


@pytest.mark.parametrize("how", PARAMS)
@pytest.mark.parametrize(
    ("source", "target"), [("cpu", "onnx"), ("cpu", "tvm"), ("reference", "cpu"), ("onnx", "cpu")]
)
def test_from_one_to_another(
    source: str, target: str, how: str, engines: dict[str, LLM], undisturbed: Any
) -> None:
    missing = {source, target} - set(engines)
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} can't run here")
    assert move(engines, [(source, 9), (target, 0)], 37, how) == undisturbed(37, how)


@settings(max_examples=15, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(
    way=st.lists(
        st.tuples(st.sampled_from(sorted(ENGINES)), st.integers(0, 9)), min_size=2, max_size=5
    ),
    length=st.sampled_from([1, 16, 17, 40]),
    how=st.sampled_from(sorted(PARAMS)),
    company=st.lists(st.tuples(st.sampled_from(sorted(ENGINES)), st.integers(1, 40)), max_size=3),
)
def test_any_way(
    way: list[tuple[str, int]], length: int, how: str, company: list[tuple[str, int]],
    engines: dict[str, LLM], undisturbed: Any,
) -> None:  # fmt: skip
    """Any chain of backends, from prompts half computed on, beside requests that stay."""
    way = [step for n, step in enumerate(way) if n == 0 or step[0] != way[n - 1][0]]
    expected = undisturbed(length, how)
    for name, own in company:
        engine = engines[name].engine
        engine.add(engine.intake.request(prompt(own), PARAMS["drawn"]))
    assert move(engines, way, length, how) == expected


def test_what_arrives_feeds_the_prefix_cache(engines: dict[str, LLM], undisturbed: Any) -> None:
    """Blocks that came from elsewhere are found by the next request, and are right."""
    if "cpu" not in engines:
        pytest.skip("needs a C++ compiler")
    fresh = 70  # nobody has asked this yet
    assert move(engines, [("reference", 12), ("cpu", 0)], fresh, "greedy") == undisturbed(
        fresh, "greedy"
    )
    (output,) = engines["cpu"].generate([prompt(fresh)], PARAMS["greedy"], use_tqdm=False)
    assert output.num_cached_tokens == 64
    assert list(output.outputs[0].token_ids) == undisturbed(fresh, "greedy")
