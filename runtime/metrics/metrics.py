"""All numbers of one server: those observed here, and those its engine keeps. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from halyard.runtime.metrics.catalogue import METRICS, MetricSpec
from halyard.runtime.metrics.engine import engine_samples
from halyard.runtime.metrics.exposition import Source, expose
from halyard.runtime.metrics.requests import MAX_TENANTS, OnEnd, RequestMetrics
from halyard.runtime.metrics.store import Histogram, Samples, Store
from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import Request

if TYPE_CHECKING:
    from halyard.runtime.engine import EngineStats

__all__ = ["CONTENT_TYPE", "MAX_MODELS", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MAX_MODELS = 32  # that were served last are shown, so that series stay few
_OF_LIVES = ("engine_restarts", "load_failures")
_COUNTERS = frozenset(spec.name for spec in METRICS if spec.kind == "counter")


class Metrics:
    """All metrics of one model on one backend, and so labelled.

    Requests are observed on the event loop's thread, steps by whoever runs them. Outlives engines:
    totals of one that is gone, or about to go, are part of the sum. Shows, beside its own, what was
    counted of models that were served before: their last requests may end after it took over.
    """

    def __init__(
        self,
        model: str,
        backend: str,
        bytes_per_block: int = 0,
        max_tenants: int = MAX_TENANTS,
    ) -> None:
        self.model = model
        self.backend = backend
        self._bytes_per_block = bytes_per_block
        self._store = Store()
        # Shared with those that come after it:
        self._lives = Store()  # what became of engines, whatever they served
        self._served: dict[tuple[str, str], Metrics] = {}  # by model and backend, the last one last
        self._leaving: list[Callable[[], EngineStats]] = []
        self._of_ended: dict[str, Samples] = {}  # totals of engines that are gone
        self._requests = RequestMetrics(self._store, max_tenants)
        self._gauges: dict[str, Samples] = {}
        self._steps = (
            self._store.histogram("step_duration_seconds"),
            self._store.histogram("step_rows"),
            self._store.histogram("step_tokens"),
        )

    @classmethod
    def after(
        cls, before: Metrics | None, model: str, backend: str, bytes_per_block: int = 0
    ) -> Metrics:
        """For an engine that takes the place of another, with the other's metrics.

        Those of a model that was served before go on.
        """
        if before is None:
            return cls(model, backend, bytes_per_block)
        if (before.model, before.backend) == (model, backend):
            return before
        metrics = before._served.get((model, backend))
        if metrics is None:
            metrics = cls(model, backend, bytes_per_block)
            metrics._lives, metrics._served = before._lives, before._served
        return metrics

    # -- requests -----------------------------------------------------------------------------

    def observe_deltas(self, deltas: Iterable[tuple[Request, RequestDelta]]) -> None:
        """What requests gained in one step."""
        self._requests.observe_deltas(deltas)

    def observe_cancelled(self, request: Request) -> None:
        """The client went away."""
        self._requests.observe_cancelled(request)

    def tell_ends(self, on_end: OnEnd | None) -> None:
        """Whom to tell, at once, of each request that has ended."""
        self._requests.on_end = on_end

    def observe_error(self, kind: str, tenant: str = "default") -> None:
        """A request was refused or failed; `kind` is one of few words: the error's code."""
        self._requests.observe_error(kind, tenant)

    def recent_latencies(self, seconds: float) -> tuple[list[float], list[float]]:
        """Times to first token, and between tokens, of the last so many seconds; both sorted."""
        since = time.monotonic() - seconds
        kept = (self._requests.first_tokens, self._requests.gaps)
        first, between = (sorted(v for when, v in own if when >= since) for own in kept)
        return first, between

    def estimated_wait_seconds(self, num_waiting: int) -> float:
        """How long a queue of that length takes at the pace of the last requests; at least 1."""
        return self._requests.estimated_wait_seconds(num_waiting)

    # -- the engine and the server ------------------------------------------------------------

    def observe_step(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """An engine ran a step."""
        duration, rows, tokens = self._steps
        duration.observe(seconds)
        rows.observe(num_rows)
        tokens.observe(num_tokens)

    def observe_restart(self) -> None:
        """An engine took the place of one that died or hung."""
        self._lives.add("engine_restarts", 1)

    def observe_load_failure(self) -> None:
        """A model or its weights could not be loaded."""
        self._lives.add("load_failures", 1)

    def describe(
        self, version: str, device: str, dtype: str, start_seconds: Mapping[str, float]
    ) -> None:
        """What runs from now on, and what its start took by phase."""
        own = (self.model, self.backend)
        self._served.pop(own, None)
        self._served[own] = self
        if len(self._served) > MAX_MODELS:
            del self._served[next(iter(self._served))]
        self._gauges["info"] = {(version, device, dtype): 1.0}
        self._gauges["start_seconds"] = {(phase,): s for phase, s in start_seconds.items()}

    def begin_to_leave(self, stats: Callable[[], EngineStats]) -> None:
        """An engine is replaced, but may still do something: its totals are read until it is gone."""
        self._leaving.append(stats)

    def left(self, stats: Callable[[], EngineStats]) -> None:
        """That engine is gone; what it counted stays. Idempotent."""
        if stats in self._leaving:
            self._leaving.remove(stats)
            _add_totals(self._of_ended, engine_samples(stats(), self._bytes_per_block))

    def render(
        self, stats: EngineStats | None, *, ready: bool = True, compat_vllm: bool = False
    ) -> bytes:
        """The exposition text, with what the engine counts as of `stats` (None: there is none)."""
        engine = engine_samples(stats, self._bytes_per_block) if stats is not None else {}
        _add_totals(engine, self._totals())
        engine["ready"] = {(): float(ready)}

        def read(spec: MetricSpec) -> Samples:
            for found in (engine, self._gauges):
                if spec.name in found:
                    return found[spec.name]
            store = self._lives if spec.name in _OF_LIVES else self._store
            return store.samples(spec.name)

        past = (other._past() for other in self._served.values() if other is not self)
        return expose((*past, Source(self.model, self.backend, read)), vllm=compat_vllm)

    def _totals(self) -> dict[str, Samples]:
        """Of all engines that are gone or about to go."""
        totals: dict[str, Samples] = {}
        _add_totals(totals, self._of_ended)
        for stats in self._leaving:
            _add_totals(totals, engine_samples(stats(), self._bytes_per_block))
        return totals

    def _past(self) -> Source:
        """What was counted while this was served; what is there now is another's."""
        totals = self._totals()

        def read(spec: MetricSpec) -> Samples:
            if spec.kind == "gauge" or spec.name in _OF_LIVES:
                return {}
            return totals.get(spec.name) or self._store.samples(spec.name)

        return Source(self.model, self.backend, read)


def _add_totals(sums: dict[str, Samples], more: Mapping[str, Samples]) -> None:
    """Add counters to counters; gauges are nobody's sum."""
    for name in _COUNTERS & more.keys():
        own = sums[name] = dict(sums.get(name, {}))
        for labels, value in more[name].items():
            before = own.get(labels, 0.0)
            if not isinstance(value, Histogram) and not isinstance(before, Histogram):
                own[labels] = before + value
