"""The benchmark counts what ran, over the null backend."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from halyard.hal.errors import ConfigError
from halyard.models.shapes import shape_config
from halyard.runtime.bench import measure_throughput, report
from halyard.runtime.llm import LLM
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
