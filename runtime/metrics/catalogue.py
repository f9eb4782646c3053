"""Every metric there is, as data: docs, dashboards, alert rules and /metrics are checked against this list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["COMMON_LABELS", "METRICS", "MetricSpec", "exported_names"]

COMMON_LABELS = ("model", "backend")
"""On every metric that starts with halyard_; vLLM's names carry model_name and engine instead."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
           120.0, 300.0)  # fmt: skip
TOKENS = tuple(float(2**power) for power in range(18))
RATES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric."""

    name: str  # without the prefix halyard_, and without _total
    kind: Literal["counter", "gauge", "histogram"]
    text: str  # what it means: one sentence without a full stop
    labels: tuple[str, ...] = ()  # beside COMMON_LABELS
    buckets: tuple[float, ...] = ()  # upper bounds, of histograms
    vllm: str = ""  # vLLM's name for the same number, without the prefix vllm: and _total

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of its series as PromQL writes them."""
        return _samples(f"halyard_{self.name}", self.kind)

    @property
    def vllm_samples(self) -> tuple[str, ...]:
        return _samples(f"vllm:{self.vllm}", self.kind) if self.vllm else ()


def _samples(name: str, kind: str) -> tuple[str, ...]:
    if kind == "counter":
        return (f"{name}_total",)
    if kind == "histogram":
        return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
    return (name,)


def _counter(name: str, text: str, *labels: str, vllm: str = "") -> MetricSpec:
    return MetricSpec(name, "counter", text, labels, vllm=vllm)


def _gauge(name: str, text: str, *labels: str, vllm: str = "") -> MetricSpec:
    return MetricSpec(name, "gauge", text, labels, vllm=vllm)


def _histogram(
    name: str, text: str, buckets: tuple[float, ...], *labels: str, vllm: str = ""
) -> MetricSpec:
    return MetricSpec(name, "histogram", text, labels, buckets, vllm)


METRICS: tuple[MetricSpec, ...] = (
    # -- requests, seen where they are answered
    _counter("requests", "Answers by how they ended: stop, length, abort (the client left), error",
             "finish_reason", "tenant", vllm="request_success"),
    _counter("request_errors", "Requests refused, failed or given up, by the error's code "
             "(out_of_memory, context_length_exceeded, queue_full, rate_limit_exceeded, cancelled, "
             "...)", "type", "tenant"),
    _histogram("time_to_first_token_seconds", "From arrival to the first token", SECONDS, "tenant",
               vllm="time_to_first_token_seconds"),
    _histogram("inter_token_latency_seconds", "Between two tokens of an answer", SECONDS,
               vllm="inter_token_latency_seconds"),
    _histogram("time_per_output_token_seconds", "Of a finished request: from its first token to its "
               "last, by token", SECONDS, vllm="request_time_per_output_token_seconds"),
    _histogram("request_latency_seconds", "From arrival to the last token", SECONDS, "tenant",
               vllm="e2e_request_latency_seconds"),
    _histogram("request_queue_seconds", "From arrival to the first step that worked on it", SECONDS,
               "tenant", vllm="request_queue_time_seconds"),
    _histogram("request_prefill_seconds", "From its first step to its first token", SECONDS,
               vllm="request_prefill_time_seconds"),
    _histogram("request_decode_seconds", "From its first token to its last", SECONDS,
               vllm="request_decode_time_seconds"),
    _histogram("request_inference_seconds", "From its first step to its last token", SECONDS,
               vllm="request_inference_time_seconds"),
    _histogram("request_prompt_tokens", "Length of prompts", TOKENS, vllm="request_prompt_tokens"),
    _histogram("request_generation_tokens", "Tokens answered, all answers of a request together",
               TOKENS, vllm="request_generation_tokens"),
    _histogram("request_tokens_per_second", "Of a finished request: tokens after the first, by the "
               "seconds they took", RATES),
    _counter("tenant_prompt_tokens", "Prompt tokens of requests that were answered", "tenant"),
    _counter("tenant_cached_tokens", "Of these, found in the prefix cache", "tenant"),
    _counter("tenant_generation_tokens", "Tokens answered", "tenant"),
    # -- queues
    _gauge("requests_running", "Sequences that run", vllm="num_requests_running"),
    _gauge("requests_waiting", "Requests that wait", vllm="num_requests_waiting"),
    _gauge("requests_swapped", "Sequences in the host tier"),
    _gauge("sequences_limit", "Most sequences of a step now: fewer after memory ran out, for a while"),
    # -- KV memory
    _gauge("kv_usage_ratio", "Share of the device's KV blocks that sequences hold, 0 to 1",
           vllm="kv_cache_usage_perc"),
    _gauge("kv_blocks_total", "KV blocks on the device"),
    _gauge("kv_blocks_used", "KV blocks held by sequences"),
    _gauge("kv_blocks_cached", "Free KV blocks with a findable prefix"),
    _gauge("host_blocks_total", "KV blocks in the host tier"),
    _gauge("host_blocks_used", "Host blocks of swapped sequences"),
    _gauge("host_blocks_cached", "Host blocks with a findable prefix"),
    _gauge("kv_waste_ratio", "Share of slots in used KV blocks that hold no token, averaged over "
           "every eighth step"),
    _counter("prefix_cache_queries", "Prompt tokens looked up", vllm="prefix_cache_queries"),
    _counter("prefix_cache_hits", "Prompt tokens found in the cache", vllm="prefix_cache_hits"),
    _counter("preemptions", "Sequences that gave way, by what became of their KV: swap, recompute",
             "kind", vllm="num_preemptions"),
    _counter("evictions", "Cached prefix blocks that lost their place: demoted to the host tier, "
             "dropped for want of room there, or lost from the host", "cause"),
    _counter("swap_bytes", "Bytes moved between tiers: out (to the host), in", "direction"),
    _counter("swap_seconds", "Seconds that steps spent on these moves; on GPUs what issuing them "
             "took, for they run beside other work", "direction"),
    _counter("blocks_copied", "Shared KV blocks copied before a write"),
    # -- steps
    _counter("prompt_tokens", "Prompt tokens computed", vllm="prompt_tokens"),
    _counter("generation_tokens", "Tokens generated", vllm="generation_tokens"),
    _counter("steps", "Engine steps"),
    _counter("out_of_memory_steps", "Steps that the device's memory was too small for: their sequences "
             "were put back and computed again, fewer at once"),
    _counter("step_phase_seconds", "Seconds by what steps did: schedule, run (moves, packing, "
             "program, sampling; on GPUs: issuing it), wait (for the device), commit", "phase"),
    _histogram("step_duration_seconds", "One engine step", SECONDS),
    _histogram("step_rows", "Sequences in a step", TOKENS[:11]),
    _histogram("step_tokens", "Tokens computed in a step", TOKENS[:15],
               vllm="iteration_tokens_total"),
    # -- the server
    _gauge("ready", "1 if requests are answered, else 0"),
    _gauge("info", "Always 1; its labels say what runs", "version", "device", "dtype"),
    _gauge("start_seconds", "What the last start took, by phase", "phase"),
    _counter("engine_restarts", "Engines started in the place of one that died or hung"),
    _counter("load_failures", "Models or weights that could not be loaded"),
    _counter("fallbacks", "Times a part took a slower way than the best it knows, by part: why is "
             "in the log", "part"),
)  # fmt: skip


def exported_names() -> dict[str, tuple[str, ...]]:
    """Series name -> its labels, as /metrics shows them; vLLM's names included."""
    names: dict[str, tuple[str, ...]] = {}
    for spec in METRICS:
        extra = ("le",) if spec.kind == "histogram" else ()
        for name in spec.samples:
            own = extra if name.endswith("_bucket") else ()
            names[name] = (*COMMON_LABELS, *spec.labels, *own)
        for name in spec.vllm_samples:
            own = extra if name.endswith("_bucket") else ()
            kept = ("finished_reason",) if spec.vllm == "request_success" else ()
            names[name] = ("model_name", "engine", *kept, *own)
    return names
