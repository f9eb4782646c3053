"""Values become Prometheus' text, under Halyard's names and, if asked for, vLLM's beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from halyard.runtime.metrics.catalogue import COMMON_LABELS, METRICS, MetricSpec
from halyard.runtime.metrics.store import Histogram, Samples

__all__ = ["Source", "expose"]


@dataclass(frozen=True, slots=True)
class Source:
    """Values of one model on one backend."""

    model: str
    backend: str
    read: Callable[[MetricSpec], Samples]  # a metric's values; one without any is left out


def expose(sources: Sequence[Source], *, vllm: bool = False) -> bytes:
    """The text of a scrape; with `vllm`, under vLLM's names too."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Values(sources, vllm))
    return generate_latest(registry)


class _Values(Collector):
    def __init__(self, sources: Sequence[Source], vllm: bool) -> None:
        self._sources, self._vllm = sources, vllm

    def collect(self) -> Iterator[Family]:
        for spec in METRICS:
            samples = {
                (source.model, source.backend, *key): value
                for source in self._sources
                for key, value in source.read(spec).items()
            }
            if not samples:
                continue
            yield _family(spec, f"halyard_{spec.name}", (*COMMON_LABELS, *spec.labels), samples)
            if self._vllm and spec.vllm:
                yield _as_vllm(spec, samples)


def _as_vllm(spec: MetricSpec, samples: Samples) -> Family:
    """vLLM has other labels: ours are summed over, but for how requests finished."""
    by_reason = spec.vllm == "request_success"
    summed: Samples = {}
    for (model, _, *key), value in samples.items():
        target = (model, "0", *key[: int(by_reason)])
        before = summed.get(target)
        if isinstance(value, Histogram):
            total = before if isinstance(before, Histogram) else Histogram(value.bounds)
            total.add(value)
            summed[target] = total
        else:
            summed[target] = value + (before if isinstance(before, float) else 0.0)
    labels = ("model_name", "engine", *(("finished_reason",) if by_reason else ()))
    return _family(spec, f"vllm:{spec.vllm}", labels, summed)


def _family(spec: MetricSpec, name: str, labels: tuple[str, ...], samples: Samples) -> Family:
    if spec.kind == "histogram":
        histograms = HistogramMetricFamily(name, spec.text, labels=labels)
        for key, value in samples.items():
            if isinstance(value, Histogram):
                histograms.add_metric(key, value.buckets(), value.sum)
        return histograms
    made = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    family = made(name, spec.text, labels=labels)
    for key, value in samples.items():
        if not isinstance(value, Histogram):
            family.add_metric(key, value)
    return family
