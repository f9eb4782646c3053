"""Steps issued behind each other on a late device give the answers of steps taken in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from late_executor import make_late

from halyard.hal.errors import RequestError
from halyard.models.shapes import shape_config
from halyard.runtime.llm import LLM
from halyard.runtime.plan import TokenEvent
from halyard.runtime.request import Request, SamplingParams

Answers = dict[tuple[str, int], list[int]]


def make(**options: Any) -> LLM:
    config = shape_config("160m")
    config.vocab_size = 512
    defaults = {"max_model_len": 96, "kv_blocks": 64, "host_kv_blocks": 0, "block_size": 4}
    return LLM(config, backend="null", load_format="dummy", **(defaults | options))


@pytest.fixture
def llm() -> Iterator[LLM]:
    made = make(kv_blocks=256)
    yield made
    made.close()


def random_params(rng: random.Random) -> SamplingParams:
    most = rng.randrange(1, 30)
    return SamplingParams(
        n=rng.choice([1, 1, 1, 1, 2, 3]),
        temperature=rng.choice([0.0, 0.0, 0.7]),
        top_p=rng.choice([1.0, 0.9]),
        seed=rng.randrange(100),
        max_tokens=most,
        min_tokens=rng.choice([0, 0, min(3, most)]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=[rng.randrange(512)] if rng.random() < 0.5 else None,
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logit_bias={rng.randrange(512): 3.0} if rng.random() < 0.2 else None,
        logprobs=rng.choice([None, None, 2]),
        prompt_logprobs=1 if rng.random() < 0.1 else None,
    )


def arrivals(llm: LLM, seed: int, count: int) -> list[tuple[int, Request]]:
    """(step, request): the same requests for each engine that is asked."""
    rng = random.Random(seed)
    shared = [rng.randrange(512) for _ in range(40)]
    found = []
    for number in range(count):
        prompt = shared[: rng.randrange(40)] + [rng.randrange(512)] * rng.randrange(1, 6)
        found.append(
            (
                rng.randrange(30),
                llm.engine.intake.request(
                    prompt,
                    random_params(rng),
                    request_id=f"r{number}",
                    priority=rng.choice([0, 0, 1]),
                ),
            )
        )
    return found


def run(
    llm: LLM, coming: list[tuple[int, Request]], aborts: dict[int, str]
) -> tuple[Answers, dict[tuple[str, int], Any]]:
    """Answers and their ends; integrity is checked after each step, and nothing may leak."""
    engine = llm.engine
    answers: Answers = {}
    ends: dict[tuple[str, int], Any] = {}
    for step in range(100_000):
        for when, request in coming:
            if when == step:
                engine.add(request)
        if step in aborts:
            engine.abort(aborts[step])
        for event in engine.step():
            key = (event.request_id, event.index)
            assert key not in ends, "an event after the end"
            answers.setdefault(key, []).extend(event.token_ids)
            scores = event.logprobs[0] if event.logprobs else None
            assert scores is None or scores.token_id == event.token_ids[0]
            if event.finish_reason is not None:
                ends[key] = (event.finish_reason, event.stop_reason)
        engine.check_integrity()
        if step > 40 and not engine.has_work():
            break
    stats = engine.stats().scheduler
    assert (stats.blocks_used, stats.host_blocks_used) == (0, 0)
    return answers, ends


PRESSURE = [
    {},
    {"kv_blocks": 26, "host_kv_blocks": 40, "preemption": "swap"},
    {"kv_blocks": 26, "preemption": "recompute", "max_num_sequences": 9, "max_batched_tokens": 16},
    {"prefix_cache": False, "block_size": 16, "max_num_sequences": 4},
]


@pytest.mark.parametrize("options", PRESSURE, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_overlap_changes_no_token(options: dict[str, Any], seed: int) -> None:
    in_turn, late = make(**options), make(**options)
    device = make_late(late, seed=seed)
    coming = arrivals(in_turn, seed, 30)
    aborts = {step: f"r{step % 30}" for step in (9, 17, 30)}
    gone = set(aborts.values())
    try:
        expected, ends = run(in_turn, coming, aborts)
        found, found_ends = run(late, coming, aborts)
    finally:
        in_turn.close()
        late.close()
    kept = {key for key in expected if key[0] not in gone}
    assert {key for key in found if key[0] not in gone} == kept
    assert {key: found[key] for key in kept} == {key: expected[key] for key in kept}
    assert {key: found_ends[key] for key in kept} == {key: ends[key] for key in kept}
    assert device.issued_behind > 0


def test_plain_requests_overlap_in_nearly_all_steps(llm: LLM) -> None:
    late = make_late(llm)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    prompts = [[100 + i, 200 + i] for i in range(8)]
    outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        first = prompt[-1] + 1
        assert output.outputs[0].token_ids == [(first + i) % 512 for i in range(50)]
    assert late.issued_behind >= llm.engine.stats().steps - 2


def test_what_is_settled_between_steps_is_not_lost(llm: LLM) -> None:
    """detach has the step in flight come back first; its tokens are told by the next step."""
    make_late(llm)
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for name, first in (("stays", 10), ("goes", 50)):
        engine.add(engine.intake.request([first], params, request_id=name))
    told = {"stays": [], "goes": []}  # type: dict[str, list[int]]
    for _ in range(5):
        for event in engine.step():
            told[event.request_id] += event.token_ids
    moving = engine.detach("goes")
    while engine.has_work():
        for event in engine.step():
            told[event.request_id] += event.token_ids
        engine.check_integrity()
    assert told["stays"] == list(range(11, 31))
    assert [50, *told["goes"]] == moving.sequence.token_ids
    assert len(told["goes"]) == 6


def test_a_device_that_fails_late_loses_no_engine(llm: LLM) -> None:
    late = make_late(llm)
    program = llm.engine.executor.program
    run_well, calls = program.run, []

    def fails_once(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("the device is gone")
        return run_well(*arguments)

    program.run = fails_once  # type: ignore[method-assign, assignment]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with pytest.raises(RuntimeError, match="gone"):
        llm.generate([[1], [2]], params)
    assert not llm.engine.has_work()
    assert llm.engine.stats().scheduler.blocks_used == 0
    assert late.issued_behind > 0
    (output,) = llm.generate([[5]], params)
    assert output.outputs[0].token_ids == list(range(6, 26))


def test_bad_logits_end_their_request_alone_and_once(llm: LLM) -> None:
    make_late(llm)
    program = llm.engine.executor.program
    run_well = program.run

    def spoils(input_ids: Any, indices: Any, batch: Any) -> Any:
        logits = run_well(input_ids, indices, batch)
        logits[input_ids[indices] >= 300] = float("nan")
        return logits

    program.run = spoils  # type: ignore[method-assign, assignment]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine = llm.engine
    engine.add(engine.intake.request([290], params, request_id="bad"))
    engine.add(engine.intake.request([5], params, request_id="good"))
    events = []
    while engine.has_work():
        events += engine.step()
        engine.check_integrity()
    assert sum(len(event.token_ids) for event in events if event.request_id == "good") == 20
    assert [e.finish_reason for e in events if e.request_id == "bad"][-1] == "error"
    assert sum(e.finish_reason is not None for e in events) == 2


def test_many_prompts_come_in_while_the_first_steps_run() -> None:
    """All are answered in order; the device does not wait for the last of them to be taken in."""
    options = {"max_batched_tokens": 64, "max_num_sequences": 8, "kv_blocks": 64}
    with make(**options) as llm:
        known: list[int] = []
        step = llm.engine.step

        def watched(meanwhile: Callable[[], None]) -> list[TokenEvent]:
            stats = llm.engine.stats().scheduler
            known.append(stats.num_waiting + stats.num_running)
            return step(meanwhile)

        llm.engine.step = watched  # type: ignore[method-assign]
        prompts = [[300 + number] * 40 for number in range(20)]
        answers = llm.generate(
            prompts, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False
        )
        assert [answer.prompt_token_ids for answer in answers] == prompts
        assert all(len(answer.outputs[0].token_ids) == 2 for answer in answers)
        assert known[0] == 2  # of 40 tokens: what one step takes
        assert known[1] == 2 + 2  # and for the next one as many
        assert max(known) <= 8 + 8  # no more wait than may run
        assert (
            len(known) <= 800 // 64 + 3
        )  # each step was full: of 800 tokens, and the last answers


def test_a_bad_prompt_behind_good_ones_gives_them_up() -> None:
    options = {"max_batched_tokens": 64, "max_num_sequences": 8, "kv_blocks": 64}
    with make(**options) as llm:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        prompts = [[300 + number] * 40 for number in range(20)]
        for bad in ([10**9], [1] * 96, [True], []):
            for place in (0, 1, 5, 20):
                with pytest.raises(RequestError):
                    llm.generate([*prompts[:place], bad, *prompts[place:]], params, use_tqdm=False)
                llm.engine.check_integrity()
                assert not llm.engine.has_work()
                assert llm.engine.stats().scheduler.blocks_used == 0
        answers = llm.generate(prompts, params, use_tqdm=False)
        assert [len(answer.outputs[0].token_ids) for answer in answers] == [2] * 20


def test_a_prompt_is_made_when_it_may_soon_run() -> None:
    """Text takes time to encode: the device does not wait for that of thousands of prompts."""
    with make(max_num_sequences=4, kv_blocks=64) as llm:
        made: list[int] = []
        request = llm.engine.intake.request

        def counted(*arguments: Any) -> Request:
            made.append(llm.engine.stats().steps)
            return request(*arguments)

        llm.engine.intake.request = counted  # type: ignore[method-assign, assignment]
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        answers = llm.generate([[5, 6]] * 40, params, use_tqdm=False)
        assert len(answers) == 40
        assert len(set(made)) > 5


def before_the_first_step(llm: LLM, prompts: list[list[int]]) -> int:
    """How many prompts are in when the device gets its first work."""
    seen: list[int] = []
    issue = llm.engine.executor.run

    def counted(*arguments: Any) -> Any:
        seen.append(llm.engine.stats().scheduler.num_running + llm.engine.num_waiting)
        return issue(*arguments)

    llm.engine.executor.run = counted  # type: ignore[method-assign]
    try:
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    finally:
        llm.engine.executor.run = issue  # type: ignore[method-assign]
    return seen[0]


def test_a_first_step_begins_when_it_is_full_and_half_of_it_new() -> None:
    """With the few prompts that hold as many tokens, were none in the cache, it would be over too soon."""
    apart = [[n, *range(39)] for n in range(100, 150)]
    alike = [[*range(36), n, *range(3)] for n in range(100, 150)]  # 4 of 40 are new
    cases: list[tuple[dict[str, Any], list[list[int]], int]] = [
        ({}, apart, 4),  # 160 tokens
        ({}, alike, 11),  # 40 + 10 * 4 are half
        ({"prefix_cache": False}, alike, 4),
        ({}, alike[:1] * 50, 32),  # 40 + 31: no more than eight steps are read
    ]
    sizes = {"kv_blocks": 900, "max_batched_tokens": 160, "max_num_sequences": 50}
    for options, prompts, expected in cases:
        llm = make(**(sizes | options))
        try:
            assert before_the_first_step(llm, prompts) == expected
        finally:
            llm.close()
