"""The last minutes of a server for the page's curves: one sample every two seconds."""

import time
from collections import deque

from halyard.api.schemas.status import HistorySample
from halyard.runtime.engine import EngineStats
from halyard.runtime.metrics import Metrics

__all__ = ["SAMPLE_SECONDS", "History"]

SAMPLE_SECONDS = 2.0
_SAMPLES = 150  # five minutes
_LATENCY_SECONDS = 10.0  # percentiles are of that long


class History:
    """Samples, oldest first."""

    def __init__(self) -> None:
        self.samples: deque[HistorySample] = deque(maxlen=_SAMPLES)
        self._before: tuple[float, int, int] | None = None  # when, tokens, prompt tokens

    def take(self, stats: EngineStats, metrics: Metrics) -> None:
        """One more sample. Rates are since the last one; a restarted engine counts from 0."""
        now = time.monotonic()
        since, tokens, prompts = self._before or (now, stats.generated_tokens, stats.prompt_tokens)
        self._before = (now, stats.generated_tokens, stats.prompt_tokens)
        seconds = max(now - since, 1e-3)
        first, between = metrics.recent_latencies(_LATENCY_SECONDS)
        scheduler = stats.scheduler
        self.samples.append(
            HistorySample(
                time=time.time(),
                tokens_per_second=max(0, stats.generated_tokens - tokens) / seconds,
                prompt_tokens_per_second=max(0, stats.prompt_tokens - prompts) / seconds,
                running=scheduler.num_running,
                waiting=scheduler.num_waiting + scheduler.num_swapped,
                kv_usage=scheduler.blocks_used / max(1, scheduler.blocks_total),
                first_token_p50=_quantile(first, 0.5),
                first_token_p95=_quantile(first, 0.95),
                between_tokens_p50=_quantile(between, 0.5),
                between_tokens_p95=_quantile(between, 0.95),
            )
        )


def _quantile(ordered: list[float], share: float) -> float | None:
    """The value that `share` of them do not exceed; None of nothing."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
