"""Metrics: what is observed is what is rendered, in a form that Prometheus' own parser reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from halyard.hal import fallbacks
from halyard.runtime.config import SchedulerConfig
from halyard.runtime.engine import EngineStats
from halyard.runtime.metrics import Metrics
from halyard.runtime.metrics.catalogue import METRICS, exported_names
from halyard.runtime.metrics.metrics import MAX_MODELS
from halyard.runtime.metrics.store import BoundedLabels, Histogram
from halyard.runtime.outputs import CompletionDelta, RequestDelta
from halyard.runtime.plan import FinishReason
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.scheduler import Scheduler

Found = dict[tuple[str, ...], float]


def engine_stats(**changes: object) -> EngineStats:
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_model_len=64)).stats()
    return EngineStats(scheduler, 3, 40, 50, 1.0, 2.0, **changes)  # type: ignore[arg-type]


def samples(text: bytes) -> list[tuple[str, Mapping[str, str], float]]:
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.startswith("process_")
    ]


def values(metrics: Metrics, stats: EngineStats | None = None, vllm: bool = False) -> Found:
    """Rendered samples by name and, in order of their names, labels but model, backend and le."""
    found: Found = {}
    text = metrics.render(stats or engine_stats(), compat_vllm=vllm)
    for name, labels, value in samples(text):
        if "le" in labels:
            continue
        if name.startswith("vllm:"):
            assert labels["model_name"] == "m"
            common: tuple[str, ...] = ("model_name", "engine")
        else:
            assert (labels["model"], labels["backend"]) == ("m", "b")
            common = ("model", "backend")
        found[(name, *(v for k, v in labels.items() if k not in common))] = value
    return found


def request(name: str = "r", tenant: str = "default", n: int = 1) -> Request:
    arrived = time.monotonic() - 2.0
    return Request(name, (1, 2), SamplingParams(n=n), 8, arrival_time=arrived, tenant=tenant)


def delta(tokens: int, finish: FinishReason | None = None, name: str = "r") -> RequestDelta:
    new = CompletionDelta(0, "", (7,) * tokens, finish_reason=finish)
    started = time.monotonic() - 0.5
    return RequestDelta(name, (new,), 2, 1, finished=finish is not None, started=started)


def test_a_request_from_first_token_to_last() -> None:
    metrics, own = Metrics("m", "b"), request()
    metrics.observe_deltas([(own, delta(1))])
    metrics.observe_deltas([(own, delta(2))])
    metrics.observe_deltas([(own, delta(1, "length"))])
    found = values(metrics)

    def total(name: str, *labels: str) -> tuple[float, float]:
        return found[(f"{name}_count", *labels)], found[(f"{name}_sum", *labels)]

    count, seconds = total("halyard_time_to_first_token_seconds", "default")
    assert count == 1
    assert 2.0 <= seconds < 10
    count, seconds = total("halyard_request_queue_seconds", "default")
    assert count == 1
    assert 1.4 <= seconds < 1.6
    count, seconds = total("halyard_request_prefill_seconds")
    assert count == 1
    assert 0.5 <= seconds < 5
    assert total("halyard_inter_token_latency_seconds")[0] == 3  # one a token after the first
    assert total("halyard_request_latency_seconds", "default")[0] == 1
    assert total("halyard_request_decode_seconds")[0] == 1
    assert total("halyard_time_per_output_token_seconds")[0] == 1
    assert total("halyard_request_generation_tokens") == (1, 4)
    assert total("halyard_request_prompt_tokens") == (1, 2)
    assert found[("halyard_requests_total", "length", "default")] == 1
    assert found[("halyard_tenant_generation_tokens_total", "default")] == 4
    assert found[("halyard_tenant_prompt_tokens_total", "default")] == 2
    assert found[("halyard_tenant_cached_tokens_total", "default")] == 1


def test_tokens_that_come_together_share_the_time_since_the_last_one() -> None:
    """The page's latency between tokens is theirs too: a loaded server gives out nothing else."""
    metrics = Metrics("m", "b")
    rows = [(request(name), delta(1, name=name)) for name in "abc"]
    metrics.observe_deltas(rows)
    time.sleep(0.02)
    metrics.observe_deltas([(own, delta(4, name=own.request_id)) for own, _ in rows])
    found = values(metrics)
    assert found[("halyard_inter_token_latency_seconds_count",)] == 12
    whole = found[("halyard_inter_token_latency_seconds_sum",)] / 3
    assert whole >= 0.02
    (between,) = metrics.recent_latencies(60.0)[1]
    assert abs(between - whole / 4) < 1e-6


def test_answers_of_one_request_end_one_by_one() -> None:
    metrics, own = Metrics("m", "b"), request(n=2)

    def both(*news: CompletionDelta, finished: bool = False) -> None:
        metrics.observe_deltas([(own, RequestDelta("r", news, 2, finished=finished))])

    both(CompletionDelta(0, "", (7,)), CompletionDelta(1, "", (8,)))
    both(CompletionDelta(0, "", (7,), finish_reason="stop"), CompletionDelta(1, "", (8,)))
    both(CompletionDelta(1, "", (8,), finish_reason="length"), finished=True)
    found = values(metrics)
    assert found[("halyard_requests_total", "stop", "default")] == 1
    assert found[("halyard_requests_total", "length", "default")] == 1
    assert found[("halyard_request_latency_seconds_count", "default")] == 1
    assert found[("halyard_tenant_generation_tokens_total", "default")] == 5


def test_nothing_is_kept_of_requests_that_end_or_leave() -> None:
    metrics = Metrics("m", "b")
    metrics.observe_deltas([(request("done"), delta(1, "stop", "done"))])
    metrics.observe_deltas([(request("gone"), delta(1, name="gone"))])
    metrics.observe_cancelled(request("gone"))
    assert not metrics._requests._open
    found = values(metrics)
    assert found[("halyard_requests_total", "stop", "default")] == 1
    assert found[("halyard_requests_total", "abort", "default")] == 1
    assert found[("halyard_request_errors_total", "default", "cancelled")] == 1


def test_tenants_and_error_types_stay_few() -> None:
    metrics = Metrics("m", "b", max_tenants=3)
    for number in range(10):
        own = request(f"r{number}", f"tenant-{number}")
        metrics.observe_deltas([(own, delta(1, "stop", f"r{number}"))])
    for number in range(1000):
        metrics.observe_error(f"code-{number}")
    found = values(metrics)
    tenants = {key[-1] for key in found if key[0] == "halyard_requests_total"}
    assert tenants == {"tenant-0", "tenant-1", "tenant-2", "other"}
    assert found[("halyard_requests_total", "stop", "other")] == 7
    types = {key[2] for key in found if key[0] == "halyard_request_errors_total"}
    assert len(types) == 65
    assert "other" in types


def test_engine_totals_and_gauges() -> None:
    metrics = Metrics("m", "b", bytes_per_block=100)
    metrics.observe_error("queue_full", "acme")
    metrics.observe_step(2, 3, 0.5)
    metrics.observe_restart()
    metrics.describe("1.0", "cpu", "float32", {"compiling": 2.5})
    fallbacks.note("some_part", "slowly, because this is a test")
    stats = engine_stats(
        phase_seconds={"run": 4.0}, swap_out_seconds=0.25, fallbacks=fallbacks.counts()
    )
    found = values(metrics, stats)
    assert found[("halyard_steps_total",)] == 3
    assert found[("halyard_prompt_tokens_total",)] == 40
    assert found[("halyard_generation_tokens_total",)] == 50
    assert found[("halyard_kv_blocks_total",)] == 8
    assert found[("halyard_kv_usage_ratio",)] == 0
    assert found[("halyard_preemptions_total", "swap")] == 0
    assert found[("halyard_request_errors_total", "acme", "queue_full")] == 1
    assert found[("halyard_step_duration_seconds_sum",)] == 0.5
    assert found[("halyard_step_phase_seconds_total", "run")] == 4
    assert found[("halyard_swap_seconds_total", "out")] == 0.25
    assert found[("halyard_fallbacks_total", "some_part")] >= 1
    assert found[("halyard_engine_restarts_total",)] == 1
    assert found[("halyard_info", "cpu", "float32", "1.0")] == 1
    assert found[("halyard_start_seconds", "compiling")] == 2.5
    assert found[("halyard_ready",)] == 1


def test_vllm_names_carry_the_same_numbers() -> None:
    metrics = Metrics("m", "b")
    for name, tenant in (("r", "one"), ("s", "two")):
        metrics.observe_deltas([(request(name, tenant), delta(1, name=name))])
        metrics.observe_deltas([(request(name, tenant), delta(1, "stop", name=name))])
    assert not any(key[0].startswith("vllm:") for key in values(metrics))
    found = values(metrics, vllm=True)
    assert found[("vllm:request_success_total", "stop")] == 2
    assert found[("vllm:time_to_first_token_seconds_count",)] == 2
    assert found[("vllm:generation_tokens_total",)] == 50
    assert found[("vllm:num_preemptions_total",)] == 0
    assert found[("vllm:num_requests_waiting",)] == 0
    # What vLLM's dashboards and autoscalers ask for.
    asked = """num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total
        prefix_cache_hits_total num_preemptions_total prompt_tokens_total generation_tokens_total
        time_to_first_token_seconds_sum inter_token_latency_seconds_sum
        request_time_per_output_token_seconds_sum e2e_request_latency_seconds_sum
        request_queue_time_seconds_sum request_prefill_time_seconds_sum
        request_decode_time_seconds_sum request_inference_time_seconds_sum
        request_prompt_tokens_sum request_generation_tokens_sum iteration_tokens_total_sum"""
    assert {f"vllm:{name}" for name in asked.split()} <= {key[0] for key in found}


def test_what_is_rendered_is_what_the_catalogue_says() -> None:
    metrics = Metrics("m", "b")
    metrics.observe_deltas([(request(), delta(1))])
    metrics.observe_deltas([(request(), delta(2, "stop"))])
    metrics.observe_error("queue_full")
    metrics.observe_load_failure()
    metrics.describe("1.0", "cpu", "float32", {"compiling": 2.5})
    stats = engine_stats(phase_seconds={"run": 1.0}, fallbacks={"x": 1})
    rendered = {
        name: set(labels) for name, labels, _ in samples(metrics.render(stats, compat_vllm=True))
    }
    assert rendered == {name: set(labels) for name, labels in exported_names().items()}
    assert len({spec.name for spec in METRICS}) == len(METRICS)
    assert not any(spec.text.endswith(".") for spec in METRICS)


def test_before_an_engine_is_there() -> None:
    metrics = Metrics("", "")
    metrics.observe_error("not_ready")
    text = metrics.render(None, ready=False)
    assert b'halyard_ready{backend="",model=""} 0.0' in text
    assert b"halyard_kv_blocks_total" not in text


def test_histograms_count_in_prometheus_form() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0)
    histogram.observe(1.5, 3)
    histogram.observe(9.0)
    assert histogram.buckets() == [("1.0", 1.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert histogram.sum == 14.5
    other = Histogram((1.0, 2.0))
    other.add(histogram)
    assert other.buckets() == histogram.buckets()


def test_bounded_labels_remember_the_first() -> None:
    label = BoundedLabels(2)
    assert [label(x) for x in ("a", "b", "c", "a")] == ["a", "b", "other", "a"]


def test_two_engines_in_one_process_keep_their_numbers_apart() -> None:
    first, second = Metrics("m", "b"), Metrics("m", "b")
    first.observe_error("X")
    assert ("halyard_request_errors_total", "default", "X") not in values(second)


def test_what_became_of_engines_is_counted_on_when_another_model_is_served() -> None:
    before = Metrics("old", "b")
    before.observe_restart()
    now = Metrics.after(before, "m", "b")
    before.observe_restart()  # of an engine that was starting meanwhile
    now.observe_load_failure()
    found = values(now)
    assert found[("halyard_engine_restarts_total",)] == 2
    assert found[("halyard_load_failures_total",)] == 1


def served(before: Metrics | None, model: str, backend: str = "b") -> Metrics:
    metrics = Metrics.after(before, model, backend)
    metrics.describe("1.0", "cpu", "float32", {})
    return metrics


def test_what_a_model_that_is_replaced_still_answers_is_shown_under_its_name() -> None:
    old = served(None, "old")
    old.observe_deltas([(request(), delta(1))])
    old_stats = engine_stats()
    old.begin_to_leave(leaving := lambda: old_stats)
    now = served(old, "m")
    Metrics.after(now, "never adopted", "b")
    old.observe_deltas([(request(), delta(1, "stop"))])
    old_stats = replace(old_stats, generated_tokens=60)

    def found(metrics: Metrics) -> Found:
        text = metrics.render(engine_stats(), compat_vllm=True)
        assert b"never adopted" not in text
        return {
            (name, *(labels.get(k, "") for k in ("model", "model_name", "finish_reason"))): value
            for name, labels, value in samples(text)
            if "le" not in labels
        }

    for ended in (False, True):
        if ended:
            old.left(leaving)
            old_stats = replace(old_stats, generated_tokens=0)  # nobody asks it any more
        seen = found(now)
        assert seen[("halyard_requests_total", "old", "", "stop")] == 1
        assert seen[("vllm:request_success_total", "", "old", "")] == 1
        assert seen[("halyard_request_latency_seconds_count", "old", "", "")] == 1
        assert seen[("halyard_generation_tokens_total", "old", "", "")] == 60
        assert seen[("vllm:generation_tokens_total", "", "old", "")] == 60
        assert seen[("halyard_generation_tokens_total", "m", "", "")] == 50
        # Of what is now there is one engine's.
        assert {key[1] for key in seen if key[0] in ("halyard_ready", "halyard_info")} == {"m"}
        assert ("halyard_kv_blocks_total", "old", "", "") not in seen
        assert ("halyard_engine_restarts_total", "old", "", "") not in seen
    again = served(now, "old")
    assert again is old
    assert found(again)[("halyard_generation_tokens_total", "old", "", "")] == 60 + 50
    assert found(again)[("halyard_ready", "old", "", "")] == 1


def test_totals_go_on_where_an_engine_takes_the_place_of_its_like() -> None:
    """Prometheus would take a smaller one for a start from 0, and count all of it again."""
    metrics = served(None, "m")
    metrics.observe_step(1, 1, 0.5)
    stats = engine_stats(phase_seconds={"run": 4.0})
    metrics.begin_to_leave(leaving := lambda: stats)
    stats = replace(stats, steps=5)
    new = engine_stats(phase_seconds={"run": 1.0, "wait": 2.0})
    for _ in range(2):
        found = values(metrics, new)
        assert found[("halyard_steps_total",)] == 5 + 3
        assert found[("halyard_step_phase_seconds_total", "run")] == 5
        assert found[("halyard_step_phase_seconds_total", "wait")] == 2
        assert found[("halyard_kv_blocks_total",)] == 8
        metrics.left(leaving)


def test_one_model_on_two_backends_is_one_to_vllms_names() -> None:
    old = served(None, "m", "other")
    old.observe_deltas([(request(), delta(1, "stop"))])
    now = served(old, "m")
    now.observe_deltas([(request(), delta(1, "stop"))])
    series = [
        (name, *labels.items()) for name, labels, _ in samples(now.render(None, compat_vllm=True))
    ]
    assert len(series) == len(set(series))
    assert b'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 2.0' in (
        now.render(None, compat_vllm=True)
    )


def test_only_so_many_models_are_remembered() -> None:
    metrics = None
    for number in range(100):
        metrics = served(metrics, f"model-{number}")
    assert metrics is not None
    models = {labels["model"] for _, labels, _ in samples(metrics.render(engine_stats()))}
    assert models == {f"model-{number}" for number in range(100 - MAX_MODELS, 100)}


def test_estimated_wait_is_at_least_a_second_and_grows_with_the_queue() -> None:
    metrics = Metrics("m", "b")
    assert metrics.estimated_wait_seconds(100) == 1.0
    now = time.monotonic()
    metrics._requests._finished.extend([now - 10, now - 5])
    assert metrics.estimated_wait_seconds(0) == 1.0
    assert 15 <= metrics.estimated_wait_seconds(4) < metrics.estimated_wait_seconds(40)


def test_a_full_step_costs_little() -> None:
    """256 rows: measured at 0.06 ms; the bound is for machines under load."""
    metrics = Metrics("m", "b")
    rows = [(request(str(i)), delta(1, name=str(i))) for i in range(256)]
    metrics.observe_deltas(rows)
    best = min(_timed(metrics, rows) for _ in range(50))
    assert best < 0.005


def _timed(metrics: Metrics, rows: list[tuple[Request, RequestDelta]]) -> float:
    started = time.perf_counter()
    metrics.observe_deltas(rows)
    return time.perf_counter() - started
