"""The whole engine over the null backend, whose next token is always the last one plus one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halyard.hal.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    HalyardError,
    RequestError,
)
from halyard.hal.types import KVLayout, KVPool
from halyard.models.shapes import shape_config
from halyard.runtime.engine import OUT_OF_MEMORY
from halyard.runtime.llm import LLM
from halyard.runtime.plan import TokenEvent
from halyard.runtime.request import SamplingParams
from halyard.runtime.running import RunningStep

Make = Callable[..., LLM]


def config(**changes: Any) -> Any:
    """A small vocabulary: sampling shouldn't be what takes the time here."""
    made = shape_config("160m")
    for name, value in ({"vocab_size": 2048} | changes).items():
        setattr(made, name, value)
    return made


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes engines on tiny pools; every one must end with all its blocks free."""
    made: list[LLM] = []

    def build(**options: Any) -> LLM:
        defaults: dict[str, Any] = {
            "model": config(),
            "max_model_len": 128,
            "kv_blocks": 64,
            "host_kv_blocks": 0,
        }
        llm = LLM(backend="null", load_format="dummy", **(defaults | options))
        made.append(llm)
        return llm

    yield build
    for llm in made:
        llm.engine.check_integrity()
        stats = llm.engine.stats().scheduler
        assert (stats.blocks_used, stats.host_blocks_used) == (0, 0)
        assert not llm.engine.has_work()
        llm.close()


def greedy(max_tokens: int = 8, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **params)


def counting(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def run(llm: LLM) -> list[TokenEvent]:
    events = []
    while llm.engine.has_work():
        events += llm.engine.step()
        llm.engine.check_integrity()
    return events


PROMPTS = [counting(100 * i + 10, 20 + i) for i in range(12)]
ANSWERS = [counting(prompt[-1] + 1, 40) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"preemption": "swap", "host_kv_blocks": 64}, "swap"),
        ({"preemption": "recompute"}, "recompute"),
        ({"preemption": "auto", "host_kv_blocks": 6}, "any"),
    ],
)
def test_answers_survive_preemption(make: Make, options: dict[str, Any], kind: str) -> None:
    llm = make(kv_blocks=12, max_batched_tokens=48, max_num_sequences=8, **options)
    outputs = llm.generate([*PROMPTS], greedy(40, ignore_eos=True))
    assert [list(output.outputs[0].token_ids) for output in outputs] == ANSWERS
    stats = llm.engine.stats().scheduler
    calls = llm.engine.executor.kernels.calls  # type: ignore[attr-defined]
    if kind == "swap":
        assert stats.preemptions_swap > 0
        assert stats.preemptions_recompute == 0
    elif kind == "recompute":
        assert stats.preemptions_recompute > 0
        assert stats.preemptions_swap == 0
        assert calls["swap_out"] == 0
    assert stats.preemptions_swap + stats.preemptions_recompute > 0
    # Every move the scheduler counted has reached the kernels.
    assert calls["swap_out"] == stats.counters.blocks_swapped_out
    assert calls["swap_in"] == stats.counters.blocks_swapped_in


def test_prefix_cache_on_equals_off_and_computes_less(make: Make) -> None:
    prompts = [[*counting(5, 64), 300 + i] for i in range(6)]
    computed = []
    for enabled in (True, False):
        llm = make(prefix_cache=enabled)
        outputs = llm.generate([*prompts], greedy())
        assert [o.outputs[0].token_ids for o in outputs] == [counting(301 + i, 8) for i in range(6)]
        assert [o.num_cached_tokens for o in outputs] == [0] + [64 * enabled] * 5
        computed.append(llm.engine.stats().prompt_tokens)
    assert computed == [65 + 5, 6 * 65]


def test_kv_waste_of_long_sequences_is_small(make: Make) -> None:
    llm = make(max_model_len=512, kv_blocks=512)
    llm.generate([counting(10 + i, 400 + i) for i in range(12)], greedy(64, ignore_eos=True))
    assert 0 < llm.engine.stats().scheduler.kv_waste < 0.04


def test_several_answers_share_the_prompt(make: Make) -> None:
    llm = make()
    output = llm.generate([counting(50, 40)], greedy(6, n=4))[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert all(answer.token_ids == counting(90, 6) for answer in output.outputs)
    assert llm.engine.stats().prompt_tokens == 40
    assert llm.engine.executor.kernels.calls["copy_blocks"] == 3  # type: ignore[attr-defined]


def test_sampled_answers_do_not_depend_on_company_or_preemption(make: Make) -> None:
    params = SamplingParams(temperature=1.0, top_k=50, seed=7, max_tokens=30, ignore_eos=True)
    alone = make().generate([PROMPTS[3]], params)[0].outputs[0].token_ids
    crowd = make(kv_blocks=12, max_batched_tokens=48, max_num_sequences=8)
    together = crowd.generate([*PROMPTS], params)[3].outputs[0].token_ids
    assert crowd.engine.stats().scheduler.preemptions_recompute > 0
    assert together == alone


def test_how_answers_end(make: Make) -> None:
    llm = make(model=config(eos_token_id=2), max_model_len=32)

    def end(prompt: list[int], params: SamplingParams) -> tuple[list[int], str | None, Any]:
        answer = llm.generate([prompt], params)[0].outputs[0]
        return list(answer.token_ids), answer.finish_reason, answer.stop_reason

    assert end([0], greedy(5)) == ([1, 2], "stop", None)
    assert end([0], greedy(5, ignore_eos=True)) == ([1, 2, 3, 4, 5], "length", None)
    assert end([70], greedy(9, stop_token_ids=[73])) == ([71, 72, 73], "stop", 73)
    # Where 73 is forbidden all others are equally likely: the first is taken, and counting goes on.
    held = greedy(6, stop_token_ids=[73], min_tokens=5, ignore_eos=True)
    assert end([70], held) == ([71, 72, 0, 1, 2, 3], "length", None)
    # The context's end.
    assert end(counting(40, 30), greedy(None)) == ([70, 71], "length", None)  # type: ignore[arg-type]


def test_prompt_logprobs_arrive_once_and_complete_over_chunks(make: Make) -> None:
    llm = make(max_batched_tokens=16, max_num_sequences=4)
    for _ in range(2):  # the second time the prompt is cached, and still scored
        output = llm.generate([counting(30, 50)], greedy(3, prompt_logprobs=1, logprobs=0))[0]
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == 50
        for token, scored in zip(counting(31, 49), output.prompt_logprobs[1:], strict=True):
            assert scored is not None
            assert scored[token].rank == 1
        assert output.outputs[0].logprobs is not None
        assert len(output.outputs[0].logprobs) == 3


def test_the_important_overtake_those_that_wait(make: Make) -> None:
    llm = make(max_num_sequences=1)
    for name, priority in (("first", 0), ("low", 5), ("high", -5)):
        llm.engine.add(
            llm.engine.intake.request([9], greedy(3), request_id=name, priority=priority)
        )
        llm.engine.step()  # "first" is running when the others come
    ended = [event.request_id for event in run(llm) if event.finish_reason]
    assert ended == ["high", "low"]  # "first" had its three tokens meanwhile


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_at_any_moment_is_silent_and_frees(make: Make, steps: int) -> None:
    llm = make(max_batched_tokens=24, max_num_sequences=8)
    for name in ("gone", "stays"):
        llm.engine.add(llm.engine.intake.request(counting(60, 40), greedy(5, n=2), request_id=name))
    for _ in range(steps):
        llm.engine.step()
    assert llm.engine.abort("gone")
    assert not llm.engine.abort("gone")
    llm.engine.check_integrity()
    events = run(llm)
    assert {event.request_id for event in events} == {"stays"}
    assert sum(event.finish_reason is not None for event in events) == 2


def test_a_row_that_is_not_a_number_fails_alone(make: Make) -> None:
    llm = make()
    program = llm.engine.executor.program
    healthy = program.run

    def poisoned(input_ids: Tensor, logit_indices: Tensor, batch: Any) -> Tensor:
        logits = healthy(input_ids, logit_indices, batch)
        logits[input_ids[logit_indices] == 666] = float("nan")
        return logits

    program.run = poisoned  # type: ignore[method-assign]
    intake = llm.engine.intake
    llm.engine.add(intake.request([5], greedy(4), request_id="well"))
    llm.engine.add(intake.request([664], greedy(9, n=2), request_id="ill"))
    events = run(llm)
    assert [e.token_ids for e in events if e.request_id == "well"] == [(6,), (7,), (8,), (9,)]
    ill = [e for e in events if e.request_id == "ill"]
    assert [e.token_ids for e in ill if e.index == 0][:-1] == [(665,), (666,)]
    last = [e for e in ill if e.finish_reason]
    assert [(e.index, e.finish_reason) for e in last] == [(0, "error"), (1, "error")]
    assert all("not finite" in (e.error or "") for e in last)


def test_what_a_failed_row_computed_is_nobodys_prefix(make: Make) -> None:
    llm = make()
    program = llm.engine.executor.program
    healthy, prompt = program.run, counting(60, 40)

    def poisoned(input_ids: Tensor, logit_indices: Tensor, batch: Any) -> Tensor:
        return healthy(input_ids, logit_indices, batch).fill_(float("nan"))

    def ask(name: str) -> list[TokenEvent]:
        llm.engine.add(llm.engine.intake.request(prompt, greedy(2), request_id=name))
        return run(llm)

    program.run = poisoned  # type: ignore[method-assign]
    assert ask("ill")[-1].finish_reason == "error"
    program.run = healthy  # type: ignore[method-assign]
    assert ask("first")[-1].num_cached_tokens == 0
    assert ask("second")[-1].num_cached_tokens > 0
    llm.engine.check_integrity()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_device_that_is_too_small_gets_fewer_sequences_and_no_answer_is_lost(
    make: Make, late: bool, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(max_num_sequences=16)
    llm.engine.overlap = overlap
    program, sizes = llm.engine.executor.program, []
    healthy = program.run

    def small(input_ids: Tensor, logit_indices: Tensor, batch: Any) -> Tensor:
        sizes.append(batch.num_rows)
        if batch.num_rows > 3 or 900 in input_ids.tolist():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return healthy(input_ids, logit_indices, batch)

    if late:  # the device tells when its results are fetched
        healthy_wait = RunningStep._wait

        def wait(step: RunningStep) -> Any:
            sizes.append(len(step.plan.rows))
            if len(step.plan.rows) > 3 or any(
                900 in row.sequence.token_ids for row in step.plan.rows
            ):
                raise RuntimeError("CUDA error: out of memory")
            return healthy_wait(step)

        monkeypatch.setattr(RunningStep, "_wait", wait)
    else:
        program.run = small  # type: ignore[method-assign]
    intake = llm.engine.intake
    for number in range(12):
        llm.engine.add(intake.request([10 * number], greedy(8), request_id=f"r{number}"))
    llm.engine.add(intake.request([895], greedy(20, n=2), request_id="large"))
    got: dict[str, list[int]] = {}
    errors: dict[tuple[str, int], str] = {}
    while llm.engine.has_work():
        for event in llm.engine.step():
            got.setdefault(event.request_id, []).extend(event.token_ids)
            if event.error is not None:
                errors[event.request_id, event.index] = event.error
        llm.engine.check_integrity()
    for number in range(12):
        assert got[f"r{number}"] == list(range(10 * number + 1, 10 * number + 9))
    assert set(errors) == {("large", 0), ("large", 1)}
    assert all(text.startswith(OUT_OF_MEMORY) for text in errors.values())
    stats = llm.engine.stats().scheduler
    assert stats.blocks_used == 0
    assert stats.out_of_memory >= 3
    assert max(sizes) > 3


def test_an_error_that_is_no_lack_of_memory_is_not_taken_for_one(make: Make) -> None:
    llm = make()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    llm.engine.executor.program.run = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="illegal"):
        llm.generate([[5]], greedy(2))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_engine_sleeps_and_wakes(make: Make) -> None:
    llm = make(host_kv_blocks=8)
    first = llm.generate([*PROMPTS], greedy(5))
    executor = llm.engine.executor
    large = replace(executor.pool.layout, block_shape=(4 << 20,))  # the null backend's own is tiny
    executor.pool = executor.device.allocate_kv(large, 8, host=False)
    executor.pool.data.fill_(1)
    used, held = resident_bytes(), executor.pool.data.nbytes
    assert held >= 100 << 20
    llm.engine.sleep()
    llm.engine.sleep()
    assert used - resident_bytes() > 0.9 * held
    assert executor.pool.data.numel() == 0
    llm.engine.wake()
    assert [o.outputs[0].token_ids for o in llm.generate([*PROMPTS], greedy(5))] == [
        o.outputs[0].token_ids for o in first
    ]
    llm.engine.add(llm.engine.intake.request([5], greedy(4)))
    with pytest.raises(HalyardError, match="requests run"):
        llm.engine.sleep()
    run(llm)


class SmallDevice:
    """A device with memory of its own that notes what it is asked for."""

    torch_device = torch.device("meta")

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.asked: list[object] = []

    def allocate_kv(self, layout: KVLayout, num_blocks: int, *, host: bool) -> KVPool:
        self.asked.append((num_blocks, host))
        pool: KVPool = self.inner.allocate_kv(layout, num_blocks, host=host)
        return pool

    def empty_cache(self) -> None:
        self.asked.append("empty_cache")

    def close(self) -> None:
        self.inner.close()


def test_a_device_of_its_own_memory_sleeps_and_wakes_whole_or_not_at_all(make: Make) -> None:
    llm = make(host_kv_blocks=8)
    executor = llm.engine.executor
    device = executor.device = SmallDevice(executor.device)  # type: ignore[assignment]
    tier, num_blocks = executor.host_pool, executor.pool.num_blocks
    llm.engine.sleep()
    assert device.asked == [(0, False), "empty_cache"]
    assert executor.host_pool is tier  # pinned memory is kept, not locked a second time
    empty = executor.pool

    def full(_: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    executor.program.move_weights = full  # type: ignore[method-assign]
    with pytest.raises(CapacityError, match="2 GiB"):
        llm.engine.wake()
    assert executor.pool is empty
    assert llm.engine.asleep
    assert device.asked[2:] == [(num_blocks, False), "empty_cache"]
    executor.program.move_weights = lambda _: None  # type: ignore[method-assign]
    llm.engine.wake()
    assert (executor.pool.num_blocks, executor.host_pool) == (num_blocks, tier)


def test_an_error_in_generate_leaves_an_engine_that_works(make: Make) -> None:
    llm = make()
    program = llm.engine.executor.program
    healthy = program.run

    def broken(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    llm.generate([[5]], greedy(2))
    program.run = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([*PROMPTS], greedy(5))
    program.run = healthy  # type: ignore[method-assign]
    llm.engine.check_integrity()
    assert not llm.engine.has_work()
    assert llm.engine.stats().scheduler.blocks_cached == 0  # what they hold is unknown
    assert llm.generate([[5]], greedy(2))[0].outputs[0].token_ids == [6, 7]


@pytest.mark.parametrize(
    ("prompt", "params", "error", "text"),
    [
        ([], greedy(), RequestError, "prompt is empty"),
        ([-1], greedy(), RequestError, "token id -1"),
        ([2048], greedy(), RequestError, "outside the vocabulary"),
        ([1.5], greedy(), RequestError, "integers"),
        ([1] * 128, greedy(), ContextLengthError, "128 tokens for .* has 128 tokens"),
        ([1], greedy(n=9), RequestError, "n must be at most 8"),
        ([1], greedy(stop_token_ids=[99999]), RequestError, "stop_token_ids"),
        ([1], greedy(logit_bias={-4: 1.0}), RequestError, "logit_bias"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    make: Make, prompt: Any, params: SamplingParams, error: type[HalyardError], text: str
) -> None:
    llm = make(max_num_sequences=8)
    with pytest.raises(error, match=text) as raised:
        llm.generate([[1, 2], prompt], params)
    assert "\n" not in str(raised.value)
    assert llm.engine.stats().steps == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"preemption": "maybe"}, "auto, swap or recompute"),
        ({"memory_utilization": 1.5}, "memory_utilization"),
        ({"max_num_sequences": 64, "max_batched_tokens": 32}, "at least max_num_sequences"),
        ({"max_modle_len": 5}, "unknown option max_modle_len"),
        ({"host_kv_blocks": -1}, "host_kv_blocks"),
        ({"max_model_len": 10**7}, "max_model_len 10000000 is more than"),
        ({"kv_blocks": 2}, "kv_blocks|max-model-len|max_model_len"),
    ],
)
def test_bad_options_are_one_line(make: Make, options: dict[str, Any], text: str) -> None:
    with pytest.raises(HalyardError, match=text) as raised:
        make(**options)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ConfigError) or "lower" in str(raised.value)
