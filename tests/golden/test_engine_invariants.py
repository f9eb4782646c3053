"""What must not change an answer: preemption, the prefix cache, company in the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

from halyard import LLM, SamplingParams
from halyard.hal.kernels.native.library import find_compiler

BACKEND = "reference" if find_compiler() is None else "cpu-eager"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", path)
    return path


@pytest.fixture
def make(folder: Path) -> Iterator[Any]:
    """Makes engines, and checks at the end that none leaked a block."""
    made: list[LLM] = []

    def build(**options: Any) -> LLM:
        options = {"backend": BACKEND, "kv_blocks": 64, "max_num_sequences": 16} | options
        made.append(LLM(folder, **options))
        return made[-1]

    yield build
    for llm in made:
        llm.engine.check_integrity()
        stats = llm.engine.stats().scheduler
        assert stats.blocks_used == 0
        assert stats.host_blocks_used == 0
        llm.close()


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(128) for _ in range(length)]


CROWD = [prompt(20 + 3 * i, i) for i in range(6)]


def tokens(outputs: Any) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=40, repetition_penalty=1.2),
    ],
    ids=["greedy", "seeded"],
)
@pytest.mark.parametrize(
    "pressure",
    [{"preemption": "swap", "host_kv_blocks": 40}, {"preemption": "recompute"}],
    ids=["swap", "recompute"],
)
def test_a_preempted_answer_is_the_undisturbed_one(
    make: Any, params: SamplingParams, pressure: dict[str, Any]
) -> None:
    calm = make().generate(CROWD, params)
    tight = make(kv_blocks=12, max_model_len=128, **pressure)
    pressed = tight.generate(CROWD, params)
    stats = tight.engine.stats().scheduler
    done = (
        stats.preemptions_swap if pressure["preemption"] == "swap" else stats.preemptions_recompute
    )
    assert done > 0
    assert tokens(pressed) == tokens(calm)


def test_prefix_cache_on_equals_off(make: Any) -> None:
    shared = prompt(40, 1)
    asked = [shared + prompt(5, i) for i in range(5)]
    params = SamplingParams(temperature=0, max_tokens=12)
    on = make()
    found = on.generate(asked, params)
    assert tokens(found) == tokens(make(prefix_cache=False).generate(asked, params))
    assert [output.num_cached_tokens for output in found] == [0, 32, 32, 32, 32]


def test_copies_equal_the_single_one(make: Any) -> None:
    llm = make()
    params = SamplingParams(temperature=0, max_tokens=12)
    single = tokens(llm.generate(CROWD[0], params))
    assert tokens(llm.generate([CROWD[0]] * 8, params)) == single * 8


def test_a_seed_draws_the_same_whatever_else_runs(make: Any) -> None:
    llm = make()
    seeded = SamplingParams(temperature=1.0, seed=11, max_tokens=12, n=3)
    other = SamplingParams(temperature=1.3, top_k=7, max_tokens=9)
    alone = tokens(llm.generate(CROWD[2], seeded))
    assert len({tuple(answer) for answer in alone}) == 3
    among = llm.generate([CROWD[0], CROWD[2], CROWD[4]], [other, seeded, other])
    assert tokens(among[1:2]) == alone


def test_stop_tokens_and_least_lengths(make: Any) -> None:
    llm = make()
    free = tokens(llm.generate(CROWD[1], SamplingParams(temperature=0, max_tokens=10)))[0]
    stop = free[3]
    first = free.index(stop)
    answer = llm.generate(
        CROWD[1], SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[stop])
    )[0].outputs[0]
    assert answer.token_ids == free[: first + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    later = llm.generate(
        CROWD[1],
        SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[stop], min_tokens=first + 2),
    )[0].outputs[0]
    assert len(later.token_ids) >= first + 2
    assert stop not in later.token_ids[: first + 2]


def test_the_host_tier_gives_evicted_prefixes_back(make: Any) -> None:
    llm = make(kv_blocks=12, host_kv_blocks=40, max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=4)
    before = tokens(llm.generate(CROWD[5], params))
    llm.generate([prompt(60, 90 + i) for i in range(4)], params)  # pushes the first one out
    again = llm.generate(CROWD[5], params)
    assert tokens(again) == before
    assert again[0].num_cached_tokens == 32
    assert llm.engine.stats().scheduler.counters.blocks_swapped_in > 0


def test_a_closed_engine_holds_no_memory(folder: Path) -> None:
    """Also while somebody still holds it."""
    llm = LLM(folder, backend=BACKEND, kv_blocks=64, host_kv_blocks=8)
    llm.generate([prompt(9, 1)], SamplingParams(max_tokens=4), use_tqdm=False)
    executor = llm.engine.executor
    llm.close()
    llm.close()
    assert not executor.pool.data.numel()
    assert executor.host_pool is None
    kept = [tensor for tensor in executor.program._initial if tensor is not None]
    assert kept
    assert {tensor.device.type for tensor in kept} == {"meta"}
    assert llm.engine.stats().scheduler.blocks_used == 0
