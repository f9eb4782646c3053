"""All numbers of one server: those observed here, and those its engine keeps. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from halyard.runtime.metrics.catalogue import MetricSpec
from halyard.runtime.metrics.engine import engine_samples
from halyard.runtime.metrics.exposition import expose
from halyard.runtime.metrics.requests import MAX_TENANTS, OnEnd, RequestMetrics
from halyard.runtime.metrics.store import Samples, Store
from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import Request

if TYPE_CHECKING:
    from halyard.runtime.engine import EngineStats

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_OF_LIVES = ("engine_restarts", "load_failures")


class Metrics:
    """All metrics of one engine, labelled with its model and backend.

    Requests are observed on the event loop's thread, steps by whoever runs them. Outlives the
    engine: after a restart its totals begin at 0, as Prometheus expects of counters.

    Args:
        before: of the model that the server served until now: what became of its engines counts on.
    """

    def __init__(
        self,
        model: str,
        backend: str,
        bytes_per_block: int = 0,
        max_tenants: int = MAX_TENANTS,
        before: Metrics | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self._bytes_per_block = bytes_per_block
        self._store = Store()
        self._lives: Store = before._lives if before is not None else Store()  # whatever is served
        self._requests = RequestMetrics(self._store, max_tenants)
        self._gauges: dict[str, Samples] = {}
        self._steps = (
            self._store.histogram("step_duration_seconds"),
            self._store.histogram("step_rows"),
            self._store.histogram("step_tokens"),
        )

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
        """What runs, and what its start took by phase."""
        self._gauges["info"] = {(version, device, dtype): 1.0}
        self._gauges["start_seconds"] = {(phase,): s for phase, s in start_seconds.items()}

    def render(
        self, stats: EngineStats | None, *, ready: bool = True, compat_vllm: bool = False
    ) -> bytes:
        """The exposition text, with what the engine counts as of `stats` (None: there is none)."""
        engine = engine_samples(stats, self._bytes_per_block) if stats is not None else {}
        engine["ready"] = {(): float(ready)}

        def read(spec: MetricSpec) -> Samples:
            for found in (engine, self._gauges):
                if spec.name in found:
                    return found[spec.name]
            store = self._lives if spec.name in _OF_LIVES else self._store
            return store.samples(spec.name)

        return expose(read, self.model, self.backend, vllm=compat_vllm)
