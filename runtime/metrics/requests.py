"""Requests as their clients see them: one observation a step for all rows of the step. No torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from halyard.runtime.metrics.store import BoundedLabels, Store
from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import Request

__all__ = ["MAX_TENANTS", "OnEnd", "RequestMetrics", "RequestTimes"]

MAX_TENANTS = 32  # more tenants than that share one label value
_MAX_ERROR_TYPES = 64


class RequestTimes:
    """A request's way so far; times in seconds of time.monotonic()."""

    __slots__ = ("arrival", "first", "last", "longest", "started", "tenant", "tokens")

    def __init__(self, tenant: str, arrival: float, started: float, now: float) -> None:
        self.tenant = tenant  # the label, not always the name
        self.arrival = arrival
        self.started = started  # the first step that worked on it
        self.first = now  # its first token
        self.last = now  # its latest token
        self.tokens = 0  # of all its answers
        self.longest = 0  # about the length of its longest answer


OnEnd = Callable[[Request, RequestTimes | None, tuple[str, ...]], None]
"""Is told of a request that has ended: its times (None: it never had a token), finish reasons."""


class RequestMetrics:
    """Observes what clients are given. Belongs to the event loop's thread."""

    def __init__(self, store: Store, max_tenants: int = MAX_TENANTS) -> None:
        self.on_end: OnEnd | None = None
        self._store = store
        self._tenant = BoundedLabels(max_tenants)
        self._error_type = BoundedLabels(_MAX_ERROR_TYPES)
        self._open: dict[str, RequestTimes] = {}  # by request id, from the first token on
        self.first_tokens: deque[tuple[float, float]] = deque(maxlen=512)  # (when, seconds)
        self.gaps: deque[tuple[float, float]] = deque(maxlen=512)  # between tokens, one a step
        self._finished: deque[float] = deque(maxlen=64)  # times of the last finished requests
        self._gaps = store.histogram("inter_token_latency_seconds")

    def observe_deltas(self, deltas: Iterable[tuple[Request, RequestDelta]]) -> None:
        """What requests gained in one step."""
        now = time.monotonic()
        known = self._open
        # (time of the last token, tokens since then) -> rows: most rows of a step share both.
        gaps: dict[tuple[float, int], int] = {}
        for request, delta in deltas:
            completions = delta.completions
            if len(completions) == 1:
                gained = total = len(completions[0].token_ids)
            else:
                lengths = [len(new.token_ids) for new in completions]
                gained, total = max(lengths, default=0), sum(lengths)
            if gained:
                times = known.get(request.request_id)
                if times is None:
                    times = known[request.request_id] = self._begin(request, delta, now)
                else:
                    gap = (times.last, gained)
                    gaps[gap] = gaps.get(gap, 0) + 1
                times.last = now
                times.tokens += total
                times.longest += gained
            # Answers end one by one, a request with its last.
            if delta.finished or (
                len(completions) > 1 and any(new.finish_reason is not None for new in completions)
            ):
                self._end(request, delta, now)
        for (last, gained), rows in gaps.items():
            self._gaps.observe((now - last) / gained, gained * rows)
        if gaps:
            last, gained = max(gaps, key=gaps.__getitem__)
            self.gaps.append((now, (now - last) / gained))  # that of most rows

    def observe_cancelled(self, request: Request) -> None:
        """The client went away."""
        label = self._tenant(request.tenant)
        times = self._open.pop(request.request_id, None)
        if times is not None:
            self._store.add("tenant_generation_tokens", times.tokens, label)
        self._store.add("requests", 1, "abort", label)
        self._store.add("request_errors", 1, "cancelled", label)
        if self.on_end is not None:
            self.on_end(request, times, ("abort",))

    def observe_error(self, kind: str, tenant: str) -> None:
        """A request was refused or failed; `kind` is one of few words: the error's code."""
        self._store.add("request_errors", 1, self._error_type(kind), self._tenant(tenant))

    def estimated_wait_seconds(self, num_waiting: int) -> float:
        """How long a queue of that length takes at the pace of the last requests; at least 1."""
        if len(self._finished) < 2:
            return 1.0
        span = time.monotonic() - self._finished[0]
        return max(1.0, num_waiting * span / len(self._finished))

    def _begin(self, request: Request, delta: RequestDelta, now: float) -> RequestTimes:
        store, label = self._store, self._tenant(request.tenant)
        times = RequestTimes(label, request.arrival_time, delta.started or now, now)
        self.first_tokens.append((now, now - times.arrival))
        observe = store.histogram
        observe("time_to_first_token_seconds", label).observe(now - times.arrival)
        observe("request_queue_seconds", label).observe(max(0.0, times.started - times.arrival))
        observe("request_prefill_seconds").observe(max(0.0, now - times.started))
        self._count_prompt(delta, label)
        return times

    def _count_prompt(self, delta: RequestDelta, label: str) -> None:
        self._store.histogram("request_prompt_tokens").observe(delta.num_prompt_tokens)
        self._store.add("tenant_prompt_tokens", delta.num_prompt_tokens, label)
        self._store.add("tenant_cached_tokens", delta.num_cached_tokens, label)

    def _end(self, request: Request, delta: RequestDelta, now: float) -> None:
        store, label = self._store, self._tenant(request.tenant)
        for new in delta.completions:
            if new.finish_reason is not None:
                store.add("requests", 1, new.finish_reason, label)
        if not delta.finished:
            return
        self._finished.append(now)
        observe = store.histogram
        observe("request_latency_seconds", label).observe(now - request.arrival_time)
        times = self._open.pop(request.request_id, None)
        if self.on_end is not None:
            reasons = {new.finish_reason for new in delta.completions if new.finish_reason}
            self.on_end(request, times, tuple(sorted(reasons)))
        if times is None:  # it never had a token
            if delta.embedding is not None:
                self._count_prompt(delta, label)
            return
        store.add("tenant_generation_tokens", times.tokens, label)
        observe("request_generation_tokens").observe(times.tokens)
        observe("request_inference_seconds").observe(max(0.0, now - times.started))
        decoding = times.last - times.first
        observe("request_decode_seconds").observe(decoding)
        if times.longest > 1 and decoding > 0:
            observe("time_per_output_token_seconds").observe(decoding / (times.longest - 1))
            observe("request_tokens_per_second").observe((times.longest - 1) / decoding)
