"""The benchmark counts what ran, over the null backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halyard.api.profile_page import profile_page
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.errors import ConfigError
from halyard.hal.types import ITEM_SIZE
from halyard.models.shapes import shape_config
from halyard.runtime.bench import measure_throughput, report
from halyard.runtime.latency import measure_steps, percentiles
from halyard.runtime.limits import DeviceLimits, device_limits, measure_limits
from halyard.runtime.llm import LLM
from halyard.runtime.profile import profiled
from halyard.runtime.request import SamplingParams
from halyard.runtime.work import watched_plans, work_of
from halyard.runtime.workloads import Workload, WorkloadRequest, load_workload


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(
        shape_config("160m"),
        backend="null",
        load_format="dummy",
        max_model_len=1024,
        kv_blocks=1024,
        host_kv_blocks=0,
    ) as made:
        yield made


def test_report_of_a_prefix_workload(llm: LLM) -> None:
    workload = load_workload("prefix", 32000, "cpu")
    measured = measure_throughput(llm, workload, repeat=2, warmup=1)
    found = json.loads(json.dumps(report(llm, measured)))
    assert found["engine"] == "halyard"
    assert found["backend"] == "null"
    assert (found["requests"], found["prompt_tokens"], found["output_tokens"]) == (16, 8704, 256)
    assert len(found["all_seconds"]) == 2
    assert found["seconds"] == min(found["all_seconds"])
    assert found["output_tokens_per_second"] == pytest.approx(256 / found["seconds"])
    assert found["total_tokens_per_second"] == pytest.approx(8960 / found["seconds"])
    # The shared 512 tokens are computed once a run: runs don't warm each other's cache.
    assert found["computed_prompt_tokens"] == 512 + 16 * 32
    again = measure_throughput(llm, workload)  # as a profile's run does
    assert again.computed_prompt_tokens == 512 + 16 * 32
    assert 0.8 < found["prefix_hit_rate"] < 1
    assert found["steps"] > 0
    assert found["peak_rss_bytes"] > 1 << 20


def test_a_request_that_does_not_fit_is_an_error(llm: LLM) -> None:
    workload = Workload("long", (WorkloadRequest((1,) * 1000, 100),))
    with pytest.raises(ConfigError, match="1100 tokens, but the context holds 1024"):
        measure_throughput(llm, workload)


def test_repeat_must_be_positive(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="repeat"):
        measure_throughput(llm, load_workload("single", 32000, "cpu"), repeat=0)


LIMITS = DeviceLimits(1e9, 1e12, None, "float32")


def test_the_least_time_of_a_run_is_counted_from_its_plans(llm: LLM) -> None:
    workload = load_workload("decode", 32000, "cpu")
    measured = measure_throughput(llm, workload, limits=LIMITS)
    assert measured.least_seconds is not None
    found = report(llm, measured)
    assert found["fraction_of_limit"] == pytest.approx(
        measured.least_seconds / measured.best_seconds
    )
    spec = llm.plan.spec
    # Null programs have no weights: what is left are keys, values and the attention over them.
    kv = llm.engine.executor.pool.layout.spec.bytes_per_token
    keys = 16 * sum(range(128, 128 + 64)) + 16 * (128 + 63)  # read by each step, and written
    assert measured.least_seconds >= keys * kv / 1e9
    assert spec.num_layers == 12


def test_arithmetic_is_the_models_not_that_of_bytes_held(llm: LLM) -> None:
    """Quantised weights are fewer bytes to read; the products stay what they are."""
    plans = []
    with watched_plans(llm, plans.append):
        llm.generate([[1] * 10], SamplingParams(max_tokens=2, temperature=0))
    assert [plan.num_tokens for plan in plans][:2] == [10, 1]
    step, spec, program = plans[0], llm.plan.spec, llm.engine.executor.program
    found = []
    for program.weight_bytes in (10**9, 10**8):
        found.append(work_of(step, llm))
    assert found[0].bytes - found[1].bytes == 9 * 10**8
    assert found[0].flops == found[1].flops
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied else 2)
    assert found[0].flops > 2 * 10 * (llm.plan.num_parameters - tables)


def test_experts_count_as_far_as_tokens_choose_them(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    with watched_plans(llm, plans.append):
        llm.generate([[1] * 10], SamplingParams(max_tokens=2, temperature=0))
    spec, whole = llm.plan.spec, 10**9
    monkeypatch.setattr(llm.engine.executor.program, "weight_bytes", whole)
    before = [work_of(step, llm) for step in plans[:2]]  # ten tokens, then one
    mixture = replace(
        spec, num_experts=8, experts_per_token=2, expert_size=spec.intermediate_size // 8
    )
    monkeypatch.setattr(llm, "plan", replace(llm.plan, spec=mixture))
    after = [work_of(step, llm) for step in plans[:2]]
    experts = 3 * spec.hidden_size * (spec.intermediate_size // 8) * 8 * spec.num_layers
    for tokens, one, other in zip((10, 1), before, after, strict=True):
        assert one.flops - other.flops == pytest.approx(2 * tokens * experts * 6 / 8)
        unread = experts * ITEM_SIZE[llm.plan.dtype] * (6 / 8) ** tokens
        assert one.bytes - other.bytes == pytest.approx(unread)


def test_steps_of_one_shape(llm: LLM) -> None:
    times = measure_steps(llm, 8, 100, 12, LIMITS)
    assert len(times.seconds) == 12
    assert times.least_seconds is not None
    assert times.least_seconds > 0
    assert not llm.engine.has_work()
    with pytest.raises(ConfigError, match="max-num-sequences"):
        measure_steps(llm, 1000, 100, 12)
    with pytest.raises(ConfigError, match="lower --context"):
        measure_steps(llm, 200, 1000, 12)


def test_percentiles() -> None:
    found = percentiles([float(i) for i in range(101)])
    assert (found["mean"], found["p50"], found["p90"], found["p99"]) == (50, 50, 90, 99)
    assert percentiles([]) == {}


def test_a_profile_accounts_for_the_time(llm: LLM) -> None:
    with profiled(llm.engine) as profile:
        measure_steps(llm, 8, 50, 10)
    assert profile.steps >= 10
    assert {"plan", "prepare", "sampling", "commit"} <= set(profile.host)
    assert sum(profile.host.values()) == pytest.approx(profile.seconds, rel=0.1)
    assert "plan" in profile.table()
    page = profile_page(profile, "a <title>")
    assert "a &lt;title&gt;" in page
    assert "<script" not in page
    assert "schedule" not in vars(llm.engine.scheduler)  # unwrapped again
    assert measure_steps(llm, 2, 5, 3).seconds


def test_limits_of_a_gpu_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure(device: object, dtype: str) -> DeviceLimits:
        calls.append(dtype)
        return LIMITS

    monkeypatch.setattr("halyard.runtime.limits.measure_limits", measure)
    device = CpuDevice()
    device.info = replace(device.info, kind="cuda")
    assert device_limits(device, "float32", tmp_path) == LIMITS
    assert device_limits(device, "float32", tmp_path) == LIMITS
    assert calls == ["float32"]
    (file,) = (tmp_path / "limits").iterdir()
    file.write_text("{")
    assert device_limits(device, "float32", tmp_path) == LIMITS
    assert calls == ["float32"] * 2


def test_limits_of_a_cpu_are_the_highest_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [replace(LIMITS, bytes_per_second=3e9), replace(LIMITS, flops_per_second=5e12), LIMITS]
    monkeypatch.setattr("halyard.runtime.limits.measure_limits", lambda *_: found.pop(0))
    told = [device_limits(CpuDevice(), "float32", tmp_path) for _ in range(3)]
    assert [one.bytes_per_second for one in told] == [3e9, 3e9, 3e9]
    assert [one.flops_per_second for one in told] == [1e12, 5e12, 5e12]


def test_limits_use_all_cores() -> None:
    device = CpuDevice()
    torch.set_num_threads(1)
    found = measure_limits(device, "float32")
    assert torch.get_num_threads() == 1
    assert found.bytes_per_second > 1e8
    assert found.flops_per_second > 1e8


@pytest.mark.parametrize("window", [1, 4, 11, 100])
def test_a_window_counts_as_far_as_it_reaches(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    plans = []
    with watched_plans(llm, plans.append):
        llm.generate([[1] * 10], SamplingParams(max_tokens=3, temperature=0))
    spec, steps = llm.plan.spec, [(0, 10), (10, 11), (11, 12)]
    before = [work_of(step, llm) for step in plans[:3]]
    half = (window,) * 6 + (0,) * 6
    monkeypatch.setattr(llm, "plan", replace(llm.plan, spec=replace(spec, windows=half)))
    after = [work_of(step, llm) for step in plans[:3]]
    kv = llm.engine.executor.pool.layout.spec.bytes_per_token
    for (start, end), one, other in zip(steps, before, after, strict=True):
        lost = {
            token: max(0, token + 1 - window) for token in range(start, end)
        }  # keys that it meets no longer
        width = spec.num_heads * spec.head_dim
        assert one.flops - other.flops == pytest.approx(4 * width * 6 * sum(lost.values()))
        assert one.bytes - other.bytes == pytest.approx(kv / 2 * min(lost.values()))
