"""What a server without work makes ahead: kernels compiled, steps recorded on a device that runs them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorders import BACKEND, record
from tiny_models import save_tiny_model
from torch import Tensor

from halyard import LLM, SamplingParams
from halyard.hal import fallbacks
from halyard.runtime.batcher import Batcher
from halyard.runtime.rehearsal import Rehearsal


def test_what_is_rehearsed_need_not_be_recorded_later(recorded: Any) -> None:
    llm, device, captured = recorded
    engine = llm.engine
    before = engine.executor.pool.data.fill_(0.25).clone()
    pieces = 0
    while engine.rehearse():
        pieces += 1
    assert device.recorded == len(captured.decode_shapes()) == 8  # 1, 2, 4, 8, 16, 24, 32, 40
    assert pieces > device.recorded  # prompts too
    assert torch.equal(engine.executor.pool.data, before)
    prompts = [[1 + i, 5, 9, 40 + i] for i in range(37)]
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    found = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    assert device.recorded == 8
    assert device.replayed >= 8
    assert not engine.rehearse()
    with LLM(llm.plan.source.path, backend=BACKEND, kv_blocks=64, max_model_len=128) as other:
        assert found == [o.outputs[0].token_ids for o in other.generate(prompts, params)]
    engine.check_integrity()


def test_kernels_are_compiled_before_anything_is_run(recorded: Any) -> None:
    llm, device, captured = recorded
    executor = llm.engine.executor
    kernels, inner, pieces = executor.kernels, captured._program, []
    ran, compiling = [0], [False]

    @contextmanager
    def only_compile() -> Iterator[None]:
        compiling[0] = True
        yield
        compiling[0] = False

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def run(self, ids: Tensor, indices: Tensor, batch: Any) -> Tensor:
            pieces.append(
                (batch.num_rows, batch.max_query_len, batch.max_seq_len, batch.num_tokens)
            )
            ran[0] += not compiling[0]
            return inner.run(ids, indices, batch)

    kernels.compiling = only_compile
    kernels.takes_empty_rows = True
    captured._program = Watched()
    before = executor.pool.data.fill_(0.25).clone()
    assert llm.engine.rehearse()
    assert not ran[0]
    assert not device.recorded
    assert torch.equal(executor.pool.data, before)
    assert not any(executor.batcher._table._owners)  # the engine's own table knows nothing of it
    kinds = {(rows, queries > 1) for rows, queries, _, _ in pieces}
    assert {(1, True), (2, True), (40, True), (1, False), (4, False), (40, False)} <= kinds
    most = llm.engine.scheduler.config.max_batched_tokens
    assert max(tokens for _, _, _, tokens in pieces) == most
    assert {keys for rows, _, keys, _ in pieces if rows == 1} >= {40, 128}
    assert llm.engine.rehearse()
    assert ran[0]
    del kernels.compiling, kernels.takes_empty_rows


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_with_prompts_that_came_is_recorded_when_there_is_time(
    recorded: Any, times: int
) -> None:
    llm, device, captured = recorded
    executor = llm.engine.executor
    executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer, False, captured.mixed_shape)  # fmt: skip
    executor.kernels.takes_empty_rows = True
    while llm.engine.rehearse():
        pass
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    for turn in range(times):
        llm.generate([[3 + 40 * turn + i] * (5 + i % 3) for i in range(12)], params)
    mixed, recordings = captured.num_mixed, device.recorded
    while llm.engine.rehearse():
        pass
    assert captured.due() is None
    assert captured.num_mixed == mixed + 1
    assert device.recorded == recordings + 1
    replayed = device.replayed
    llm.generate([[90 + i] * (5 + i % 3) for i in range(12)], params)  # no cached prefix
    assert device.recorded == recordings + 1
    assert device.replayed >= replayed + 2


def test_steps_with_prompts_are_replayed_from_the_first_one_on(recorded: Any) -> None:
    llm, device, captured = recorded
    executor = llm.engine.executor
    shape = captured.mixed_shape
    executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer, False, shape)
    prompts = [[3 + i] * (5 + i % 3) for i in range(12)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM(llm.plan.source.path, backend=BACKEND, kv_blocks=64, max_model_len=128) as other:
        expected = [o.outputs[0].token_ids for o in other.generate([*prompts, [9, 8, 7]], params)]
    executor.kernels.takes_empty_rows = True
    assert shape(70, 12, 12, 7) == (96, 32, 128)  # nothing is recorded
    assert shape(3, 1, 1, 3) is None
    while llm.engine.rehearse():
        pass
    most = llm.engine.scheduler.config.max_batched_tokens
    shapes = [one for one in captured.mixed_shapes() if one[0] <= most]
    assert len(shapes) == 5
    assert {(*one, True, False) for one in shapes} <= captured._replays.keys()
    recordings = device.recorded
    assert shape(70, 12, 12, 7) == (256, 40, 128)
    assert shape(3, 1, 1, 3) == (256, 40, 128)  # a lone prompt, too
    assert shape(257, 12, 12, 7) == (320, 40, 128)
    assert shape(257, 12, 41, 7) is None  # more than the recorded ones have room for
    for wanted, given in (([[9, 8, 7]], expected[12:]), (prompts, expected[:12])):
        replayed = device.replayed
        found = [o.outputs[0].token_ids for o in llm.generate(wanted, params)]
        assert found == given
        assert device.replayed >= replayed + 4
    assert device.recorded == recordings
    llm.engine.check_integrity()


@pytest.mark.parametrize("slow", [True, False])
def test_large_steps_are_recorded_ahead_where_their_launches_take_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow: bool
) -> None:
    # On this device a step is done when it is launched.
    monkeypatch.setattr("halyard.runtime.rehearsal._LAUNCHING", 0.5 if slow else 1.0)
    save_tiny_model("llama", tmp_path)
    options: dict[str, Any] = {"kv_blocks": 400, "max_num_sequences": 40, "max_model_len": 128}
    prompts = [[3 + i] * (58 + i % 3) for i in range(38)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM(tmp_path, backend=BACKEND, **options, max_batched_tokens=2500) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        executor = llm.engine.executor
        device, captured = record(llm, 40, 8, 2500)
        executor.kernels.takes_empty_rows = True  # type: ignore[attr-defined]
        shape = captured.mixed_shape
        executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer, mixed=shape)
        assert [shape(2204, rows, rows, 60) for rows in (1, 38)] == [None, None]
        while llm.engine.rehearse():
            pass
        recordings, wanted = device.recorded, (2500, 40, 128) if slow else None
        assert [shape(2204, rows, rows, 60) for rows in (1, 38)] == [wanted, wanted]
        assert shape(2501, 38, 38, 60) is None
        llm.engine.scheduler.reset()  # no cached prefix
        replayed = device.replayed
        found = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        assert found == expected
        assert device.recorded == recordings
        assert (device.replayed - replayed >= 4) == slow
        llm.engine.check_integrity()
        del executor.kernels.takes_empty_rows  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sequences", "length", "tokens"),
    [(1, 16, 1), (1, 128, None), (2, 33, 7), (5, 16, 64), (300, 40, None)],
)
def test_everything_is_rehearsed_within_any_limits(
    tmp_path: Path, sequences: int, length: int, tokens: int | None
) -> None:
    save_tiny_model("llama", tmp_path)
    options: dict[str, Any] = {
        "kv_blocks": 8,
        "max_num_sequences": sequences,
        "max_model_len": length,
        "max_batched_tokens": tokens,
    }
    with LLM(tmp_path, backend=BACKEND, **options) as llm:
        executor = llm.engine.executor
        device, captured = record(llm, sequences, -(-length // 16))
        executor.kernels.takes_empty_rows = True  # type: ignore[attr-defined]
        executor.kernels.compiling = nullcontext  # type: ignore[attr-defined]
        before = fallbacks.counts().get("rehearsal", 0)
        while llm.engine.rehearse():
            pass
        assert fallbacks.counts().get("rehearsal", 0) == before
        assert device.recorded >= len(captured.decode_shapes())  # and what came once meanwhile


@pytest.mark.parametrize(("tokens", "rows"), [(32, 32), (1000, 8), (33, 32), (64, 8), (2048, 1024)])
def test_a_rehearsed_step_has_the_shape_that_came(recorded: Any, tokens: int, rows: int) -> None:
    from halyard.runtime.rehearsal import _shares

    counts = _shares(tokens, rows)
    assert sum(counts) == tokens
    assert max(counts) > 1
    assert len(counts) in (rows, rows - 1)


def test_nothing_is_rehearsed_without_room_or_while_requests_are_here(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, device, _ = recorded
    engine = llm.engine
    engine.add(engine.intake.request([1, 2, 3], SamplingParams(max_tokens=2)))
    assert not engine.rehearse()
    while engine.has_work():
        engine.step()
    memory = device.memory()
    few = replace(memory, total=80 << 30, free=2 << 30)  # of an H100's
    monkeypatch.setattr(device, "memory", lambda: few, raising=False)
    assert not engine.rehearse()
    monkeypatch.undo()
    assert engine.rehearse()

    def capture(step: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "capture", capture)
    rehearsal, recordings = Rehearsal(engine.executor, 512), device.recorded
    taken = [rehearsal.one() for _ in range(12)]
    assert not any(taken[taken.index(False) :])  # the first that doesn't fit is the last
    assert device.recorded == recordings
    assert [
        o.outputs[0].finish_reason for o in llm.generate([[5, 6]], SamplingParams(max_tokens=1))
    ]


def test_a_step_that_fails_while_nobody_waits_ends_the_rehearsal_alone(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _, captured = recorded

    def broken(*inputs: Any) -> Any:
        raise RuntimeError("this kernel doesn't compile")

    before = fallbacks.counts().get("rehearsal", 0)
    with monkeypatch.context() as patch:
        patch.setattr(captured, "run", broken)
        assert [llm.engine.rehearse() for _ in range(3)] == [False] * 3
    assert fallbacks.counts()["rehearsal"] == before + 1
    assert (
        llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0]
        .outputs[0]
        .token_ids
    )
