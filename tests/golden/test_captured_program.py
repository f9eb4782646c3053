"""Recorded decode steps, on a device that records by running again: the same tokens, in one buffer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recorders import BACKEND, InPlace, Recorder, SharingRecorder, record
from tiny_models import save_tiny_model

from halyard import LLM, SamplingParams
from halyard.compiler.captured import CapturedProgram
from halyard.runtime.batcher import Batcher

sys.path.insert(0, str(Path(__file__).parents[1] / "null"))
from late_executor import make_late


@pytest.mark.parametrize(
    ("able", "with_prompts"), [(True, False), (False, False), (True, True), (False, True)]
)
def test_recorded_steps_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, able: bool, with_prompts: bool
) -> None:
    monkeypatch.setattr("halyard.compiler.captured._OFTEN", 2)
    save_tiny_model("llama", tmp_path)
    prompts = [[1 + i, 5, 9, 40 + i] * (1 + i) for i in range(7)]
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=6 + 3 * i,
                       ignore_eos=True, frequency_penalty=0.5 * (i == 4))
        for i in range(7)
    ]  # fmt: skip
    options: dict[str, Any] = {
        "kv_blocks": 64,
        "prefix_cache": False,
        "max_num_sequences": 8,
        "max_model_len": 128,
    }
    with LLM(tmp_path, backend=BACKEND, **options) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        executor = llm.engine.executor
        recorder = SharingRecorder() if able else Recorder(able)
        program: Any = InPlace(executor.program)
        captured = CapturedProgram(program, recorder, 8, 8, 16)  # type: ignore[arg-type]
        captured.set_pool(executor.pool)
        executor.program = captured
        mixed = captured.mixed_shape if with_prompts else None
        executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer, mixed=mixed)
        for turn in range(4):
            if turn == 2:
                make_late(llm)
            found = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
            assert found == expected
        assert (recorder.replayed > 20) == able
        assert (recorder.recorded > 0) == able
        assert (captured.num_mixed > 0) == (able and with_prompts)
        llm.engine.check_integrity()


def test_a_wider_recording_serves_while_that_costs_less(recorded: Any) -> None:
    llm, device, captured = recorded
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    llm.generate([[1 + i, 5, 9, 40 + i] for i in range(37)], params)
    assert device.recorded == 1  # what 37 rows fit in, and 37 rows ending together
    assert captured.decode_shape(37, 7) == captured.fitting_shape(37, 7) == (40, 128)
    assert captured.decode_shape(3, 7, shares=True) == (4, 128)  # none has room
    prompts = [[7, 8, 9]]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)  # 19 steps decode
    with LLM(llm.plan.source.path, backend=BACKEND, kv_blocks=64, max_model_len=128) as other:
        expected = other.generate(prompts, params)[0].outputs[0].token_ids
    for recordings in (1, 2):  # 39 rows in vain a step: for 26 of them
        assert llm.generate(prompts, params)[0].outputs[0].token_ids == expected
        assert device.recorded == recordings
    assert captured.decode_shape(1, 7) == (1, 128)
    assert captured.decode_shape(2, 7) == (40, 128)
    captured.set_pool(llm.engine.executor.pool)
    assert captured.decode_shape(2, 7) == (2, 128)


def test_when_a_fitting_step_is_recorded_after_all(recorded: Any) -> None:
    _, _, captured = recorded
    captured._replays[24, 24, 128, False, False] = (lambda: None, torch.empty(0))
    assert [captured.decode_shape(16, 7) for _ in range(129)] == [(24, 128)] * 128 + [(16, 128)]
    steps = 0  # with others in between only all of it together counts
    while captured.decode_shape(8, 7) == (24, 128):
        assert captured.decode_shape(16, 7) == (24, 128)
        steps += 1
    assert steps == 16384 // 16
    captured._reach = lambda keys: 16  # as with longer contexts: that recording's reach is longer
    assert [captured.decode_shape(24, 7) for _ in range(513)] == [(24, 128)] * 512 + [(24, 16)]


@pytest.mark.parametrize(("waits", "room"), [(True, True), (False, True), (True, False)])
def test_large_steps_are_recorded_when_the_device_waited_for_their_like(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: bool, room: bool
) -> None:
    monkeypatch.setattr("halyard.compiler.captured.room_to_record", lambda _device: room)
    save_tiny_model("llama", tmp_path)
    options: dict[str, Any] = {"kv_blocks": 400, "max_num_sequences": 40, "max_model_len": 128}
    rounds = [[[3 + i + 11 * turn] * (58 + i % 3) for i in range(38)] for turn in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM(tmp_path, backend=BACKEND, **options, max_batched_tokens=2500) as llm:
        expected = [[o.outputs[0].token_ids for o in llm.generate(r, params)] for r in rounds]
        executor = llm.engine.executor
        _, captured = record(llm, 40, 8, 2500)
        executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer, False, captured.mixed_shape)  # fmt: skip
        issue = executor.issue

        def launch(*arguments: Any) -> Any:  # as the engine tells on a device that overlaps
            step = issue(*arguments)
            captured.launched(waits)
            return step

        monkeypatch.setattr(executor, "issue", launch)
        large = []
        for prompts, tokens in zip(rounds, expected, strict=True):
            llm.engine.scheduler.reset()  # no cached prefix
            assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == tokens
            large.append(sum(key[0] > 2048 for key in captured._replays))
        assert large == ([0, 0, 1, 1, 1] if waits and room else [0] * 5)
        llm.engine.check_integrity()


def test_what_came_before_is_not_blamed_on_a_large_step(recorded: Any) -> None:
    _, _, captured = recorded
    large = CapturedProgram(captured._program, captured._device, 40, 8, 16, 4096)
    for _ in range(9):
        assert large.mixed_shape(4000, 40, 40, 100) is None
        large.launched(waited=False)
        large.launched(waited=True)  # of nothing
        assert large.mixed_shape(4000, 40, 40, 100) is None
        large.decode_shape(8, 100)
        large.launched(waited=True)  # of a decode step
    assert large.mixed_shape(4000, 1, 1, 100) is None
    large.launched(waited=True)  # of a lone prompt, for which nobody waits
    assert large.due() is None


def test_a_fitting_step_with_prompts_is_recorded_where_it_comes_often(recorded: Any) -> None:
    _, _, captured = recorded
    captured._replays[256, 40, 128, True, False] = (lambda: None, torch.empty(0))
    # What was recorded because it came is for its like alone.
    assert captured.mixed_shape(70, 12, 12, 7) == (96, 32, 128)
    captured.record_next(256, 40, 128)
    assert [captured.mixed_shape(70, 12, 12, 7)[0] for _ in range(65)] == [256] * 64 + [96]
    assert captured.mixed_shape(300, 12, 12, 7) == (320, 32, 128)  # none has room
    captured.record_next(2048, 40, 128)
    assert captured.mixed_shape(1700, 12, 12, 7) == (1792, 32, 128)  # not recorded yet
    captured._replays[2048, 40, 128, True, False] = captured._replays[256, 40, 128, True, False]
    assert captured.mixed_shape(1500, 12, 12, 7) == (1536, 32, 128)  # a third in vain
    assert captured.mixed_shape(1700, 12, 12, 7) == (2048, 40, 128)
    assert {captured.mixed_shape(1700, 1, 1, 7) for _ in range(99)} == {(2048, 40, 128)}


def test_nobody_waits_for_the_recording_of_a_step_with_prompts_that_seldom_comes(
    recorded: Any,
) -> None:
    llm, device, captured = recorded
    executor = llm.engine.executor
    executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer, False, captured.mixed_shape)  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=1)
    mixed = []
    for turn in range(5):
        llm.generate([[3 + 12 * turn + i] * (5 + i % 3) for i in range(12)], params)
        mixed.append(captured.num_mixed)
    assert mixed == [0, 0, 1, 1, 1]
    assert device.replayed == 3
    assert captured.due() is None
