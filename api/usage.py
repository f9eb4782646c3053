"""A tenant's use as data, and its price from what the machine costs an hour."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from halyard.api.limits import Meter
from halyard.runtime.engine import EngineStats

__all__ = ["Price", "usage_of"]


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens cost here, as measured: the engine's busy time over the tokens it computed.

    Idle time is in nobody's price; `per_hour` is what the machine costs in any case.
    """

    per_hour: float | None  # cost_per_hour of the backend's row in hw_matrix.yaml; None: not told
    per_million: float | None  # of a million computed tokens; None: nothing computed yet

    @classmethod
    def of(cls, cost_per_hour: float | None, stats: EngineStats) -> Price:
        tokens = stats.prompt_tokens + stats.generated_tokens
        if cost_per_hour is None or not tokens:
            return cls(cost_per_hour, None)
        return cls(cost_per_hour, cost_per_hour / 3600 * stats.busy_seconds / tokens * 1e6)


def usage_of(tenant: str, meter: Meter, price: Price) -> dict[str, Any]:
    """One tenant's totals since the server started."""
    usage = meter.usage
    computed = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
    cost = None if price.per_million is None else round(price.per_million * computed / 1e6, 6)
    return {
        "object": "usage",
        "tenant": tenant,
        **asdict(usage),
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "running": meter.running,
        "cost": cost,
    }
