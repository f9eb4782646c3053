"""Metrics: what is observed is what is rendered, in a form that Prometheus' own parser reads."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from halyard.runtime.config import SchedulerConfig
from halyard.runtime.engine import EngineStats
from halyard.runtime.metrics import Metrics
from halyard.runtime.outputs import CompletionDelta, RequestDelta
from halyard.runtime.plan import FinishReason
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.scheduler import Scheduler


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Rendered samples by name and every label but model, backend and le."""
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_model_len=64)).stats()
    stats = EngineStats(scheduler, 3, 40, 50, 1.0, 2.0)
    found = {}
    for family in text_string_to_metric_families(metrics.render(stats).decode()):
        for sample in family.samples:
            if "le" not in sample.labels:
                assert sample.labels["model"] == "m"
                assert sample.labels["backend"] == "b"
                extra = (v for k, v in sample.labels.items() if k not in ("model", "backend"))
                found[(sample.name, *extra)] = sample.value
    return found


def request(name: str = "r") -> Request:
    return Request(name, (1, 2), SamplingParams(), 8, arrival_time=time.monotonic() - 2.0)


def delta(tokens: int, finish: FinishReason | None = None, name: str = "r") -> RequestDelta:
    new = CompletionDelta(0, "", (7,) * tokens, finish_reason=finish)
    return RequestDelta(name, (new,), 2, finished=finish is not None)


def test_a_request_from_first_token_to_last() -> None:
    metrics, own = Metrics("m", "b"), request()
    metrics.observe_delta(own, delta(1))
    metrics.observe_delta(own, delta(2))
    metrics.observe_delta(own, delta(1, "length"))
    found = values(metrics)
    assert found[("halyard_time_to_first_token_seconds_count",)] == 1
    assert 2.0 <= found[("halyard_time_to_first_token_seconds_sum",)] < 10
    assert found[("halyard_inter_token_latency_seconds_count",)] == 2
    assert found[("halyard_request_latency_seconds_count",)] == 1
    assert found[("halyard_requests_total", "length")] == 1


def test_nothing_is_kept_of_requests_that_end_or_leave() -> None:
    metrics = Metrics("m", "b")
    metrics.observe_delta(request("done"), delta(1, "stop", "done"))
    metrics.observe_delta(request("gone"), delta(1, name="gone"))
    metrics.observe_cancelled("gone")
    assert metrics._last_token == {}
    found = values(metrics)
    assert found[("halyard_requests_total", "stop")] == 1
    assert found[("halyard_requests_total", "abort")] == 1


def test_engine_totals_and_gauges() -> None:
    metrics = Metrics("m", "b")
    metrics.observe_error("QueueFullError")
    metrics.observe_step(2, 3, 0.5)
    found = values(metrics)
    assert found[("halyard_steps_total",)] == 3
    assert found[("halyard_prompt_tokens_total",)] == 40
    assert found[("halyard_generation_tokens_total",)] == 50
    assert found[("halyard_kv_blocks_total",)] == 8
    assert found[("halyard_kv_blocks_used",)] == 0
    assert found[("halyard_preemptions_total", "swap")] == 0
    assert found[("halyard_request_errors_total", "QueueFullError")] == 1
    assert found[("halyard_step_duration_seconds_sum",)] == 0.5


def test_two_engines_in_one_process_keep_their_numbers_apart() -> None:
    first, second = Metrics("m", "b"), Metrics("m", "b")
    first.observe_error("X")
    assert ("halyard_request_errors_total", "X") not in values(second)


def test_estimated_wait_is_at_least_a_second_and_grows_with_the_queue() -> None:
    metrics = Metrics("m", "b")
    assert metrics.estimated_wait_seconds(100) == 1.0
    now = time.monotonic()
    metrics._finished.extend([now - 10, now - 5])
    assert metrics.estimated_wait_seconds(0) == 1.0
    assert 15 <= metrics.estimated_wait_seconds(4) < metrics.estimated_wait_seconds(40)
