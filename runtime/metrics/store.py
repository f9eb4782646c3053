"""Where numbers are kept between two scrapes. One writer a metric; a reader may come from anywhere.

Lighter than prometheus_client's own metrics, which take a lock and find their labels for every
observation: here equal values are counted at once, and a step of 256 rows costs some 0.1 ms.
"""

from __future__ import annotations

from bisect import bisect_left

from halyard.runtime.metrics.catalogue import METRICS, MetricSpec

__all__ = ["BoundedLabels", "Histogram", "Samples", "Store"]

Labels = tuple[str, ...]
OTHER = "other"


class Histogram:
    """Counts of values by bucket. A value equal to a bound belongs to its bucket."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above every bound
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def add(self, other: Histogram) -> None:
        """Take in another's values; both have the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to there), in Prometheus' form."""
        total, made = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            made.append((bound, float(total)))
        return made


Samples = dict[Labels, float | Histogram]
"""One metric's values by its own labels' values."""


class BoundedLabels:
    """Keeps a label's values few: the first `limit` are themselves, later ones are "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[str, str] = {}

    def __call__(self, value: str) -> str:
        known = self._known.get(value)
        if known is None:
            if len(self._known) >= self._limit:
                return OTHER
            known = self._known[value] = value
        return known


class Store:
    """Every metric's values. Those without labels start at 0, so that rates of them exist at once."""

    def __init__(self) -> None:
        self.specs: dict[str, MetricSpec] = {spec.name: spec for spec in METRICS}
        self._samples: dict[str, Samples] = {name: {} for name in self.specs}

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Count a counter up."""
        own = self._samples[name]
        before = own.get(labels, 0.0)
        own[labels] = (0.0 if isinstance(before, Histogram) else before) + amount

    def histogram(self, name: str, *labels: str) -> Histogram:
        """A histogram to observe with: keep it where values are many."""
        own = self._samples[name]
        found = own.get(labels)
        if not isinstance(found, Histogram):
            found = own[labels] = Histogram(self.specs[name].buckets)
        return found

    def samples(self, name: str) -> Samples:
        """A metric's values now; new keys may come while it is read, so it is a copy."""
        own = dict(self._samples[name])
        spec = self.specs[name]
        if not own and not spec.labels and spec.kind != "gauge":
            own[()] = Histogram(spec.buckets) if spec.kind == "histogram" else 0.0
        return own
