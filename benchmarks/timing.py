"""Competitors timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable


def best_of(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The fastest of many runs of each call in seconds, all calls taking turns."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    stop = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < stop:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
    return best
