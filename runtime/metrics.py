"""Numbers for operators, in Prometheus' form. Observed once a delta or a step, never a token. No torch."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from halyard.runtime.engine import EngineStats

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All metrics of one engine, labelled with its model and backend."""

    def __init__(self, model: str, backend: str, bytes_per_block: int = 0) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model": model, "backend": backend}
        self._bytes_per_block = bytes_per_block
        self._stats: EngineStats | None = None
        self._last_token: dict[str, float] = {}  # request id -> time of its last delta
        self._finished: deque[float] = deque(maxlen=64)  # times of the last finished requests

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(
                f"halyard_{name}", text, ["model", "backend", *labels], registry=self.registry
            )

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                f"halyard_{name}_seconds",
                text,
                ["model", "backend"],
                registry=self.registry,
                buckets=_SECONDS,
            )

        self._requests = counter("requests", "Answers by how they ended", "finish_reason")
        self._errors = counter("request_errors", "Requests refused or failed, by type", "type")
        self._ttft = histogram("time_to_first_token", "From arrival to the first token")
        self._itl = histogram("inter_token_latency", "Between two tokens of an answer")
        self._e2e = histogram("request_latency", "From arrival to the last token")
        self._step = histogram("step_duration", "One engine step")
        self.registry.register(_StatsCollector(self))

    def observe_delta(self, request: Request, delta: RequestDelta) -> None:
        """What a request gained in one step."""
        now = time.monotonic()
        gained = max((len(new.token_ids) for new in delta.completions), default=0)
        if gained:
            before = self._last_token.get(request.request_id)
            if before is None:
                self._ttft.labels(**self._labels).observe(now - request.arrival_time)
            else:
                self._itl.labels(**self._labels).observe((now - before) / gained)
            self._last_token[request.request_id] = now
        for new in delta.completions:
            if new.finish_reason is not None:
                self._requests.labels(**self._labels, finish_reason=new.finish_reason).inc()
        if delta.finished:
            self._finished.append(now)
            self._last_token.pop(request.request_id, None)
            self._e2e.labels(**self._labels).observe(now - request.arrival_time)

    def observe_cancelled(self, request_id: str) -> None:
        """The client went away."""
        self._last_token.pop(request_id, None)
        self._requests.labels(**self._labels, finish_reason="abort").inc()

    def observe_error(self, kind: str) -> None:
        """A request was refused or failed; `kind` is one of few words, e.g. the error's class."""
        self._errors.labels(**self._labels, type=kind).inc()

    def observe_step(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        self._step.labels(**self._labels).observe(seconds)

    def estimated_wait_seconds(self, num_waiting: int) -> float:
        """How long a queue of that length takes at the pace of the last requests; at least 1."""
        if len(self._finished) < 2:
            return 1.0
        span = time.monotonic() - self._finished[0]
        return max(1.0, num_waiting * span / len(self._finished))

    def render(self, stats: EngineStats) -> bytes:
        """The exposition text, with gauges as of `stats`."""
        self._stats = stats
        return generate_latest(self.registry)

    def families(self) -> Iterator[Metric]:
        """Gauges and totals that the engine keeps itself."""
        stats = self._stats
        if stats is None:
            return
        names, values = list(self._labels), list(self._labels.values())
        s, c = stats.scheduler, stats.scheduler.counters

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"halyard_{name}", text, labels=names)
            family.add_metric(values, value)
            return family

        def total(name: str, text: str, value: float, **extra: str) -> Metric:
            family = CounterMetricFamily(f"halyard_{name}", text, labels=[*names, *extra])
            family.add_metric([*values, *extra.values()], value)
            return family

        yield gauge("requests_running", "Sequences that run", s.num_running)
        yield gauge("requests_waiting", "Requests that wait", s.num_waiting)
        yield gauge("requests_swapped", "Sequences in the host tier", s.num_swapped)
        yield gauge("kv_blocks_total", "KV blocks on the device", s.blocks_total)
        yield gauge("kv_blocks_used", "KV blocks held by sequences", s.blocks_used)
        yield gauge("kv_blocks_cached", "Free KV blocks with a findable prefix", s.blocks_cached)
        yield gauge("host_blocks_total", "KV blocks in the host tier", s.host_blocks_total)
        yield gauge("host_blocks_used", "Host blocks of swapped sequences", s.host_blocks_used)
        yield gauge(
            "host_blocks_cached", "Host blocks with a findable prefix", s.host_blocks_cached
        )
        yield gauge("kv_waste_ratio", "Share of slots in used KV blocks that hold no token, "
                    "averaged over all steps", s.kv_waste)  # fmt: skip
        yield total("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
        yield total("generation_tokens", "Tokens generated", stats.generated_tokens)
        yield total("steps", "Engine steps", stats.steps)
        yield total("prefix_cache_queries", "Prompt tokens looked up", c.prefix_queries)
        yield total("prefix_cache_hits", "Prompt tokens found in the cache", c.prefix_hits)
        preempted = CounterMetricFamily(
            "halyard_preemptions", "Sequences that gave way", labels=[*names, "kind"]
        )
        preempted.add_metric([*values, "swap"], s.preemptions_swap)
        preempted.add_metric([*values, "recompute"], s.preemptions_recompute)
        yield preempted
        evicted = CounterMetricFamily(
            "halyard_evictions", "Cached prefix blocks evicted", labels=[*names, "cause"]
        )
        evicted.add_metric([*values, "demoted"], c.evictions_demoted)
        evicted.add_metric([*values, "dropped"], c.evictions_dropped)
        evicted.add_metric([*values, "host"], c.host_evictions)
        yield evicted
        moved = CounterMetricFamily(
            "halyard_swap_bytes", "Bytes moved between tiers", labels=[*names, "direction"]
        )
        moved.add_metric([*values, "out"], c.blocks_swapped_out * self._bytes_per_block)
        moved.add_metric([*values, "in"], c.blocks_swapped_in * self._bytes_per_block)
        yield moved


class _StatsCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()
