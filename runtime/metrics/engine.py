"""What an engine counts itself, read off its stats when somebody asks. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from halyard.runtime.metrics.store import Samples

if TYPE_CHECKING:
    from halyard.runtime.engine import EngineStats

__all__ = ["engine_samples"]


def engine_samples(stats: EngineStats, bytes_per_block: int) -> dict[str, Samples]:
    """Metric name -> values by label values."""
    s, c = stats.scheduler, stats.scheduler.counters
    plain: dict[str, float] = {
        "requests_running": s.num_running,
        "requests_waiting": s.num_waiting,
        "requests_swapped": s.num_swapped,
        "sequences_limit": s.max_rows,
        "out_of_memory_steps": s.out_of_memory,
        "kv_usage_ratio": s.blocks_used / s.blocks_total if s.blocks_total else 0.0,
        "kv_blocks_total": s.blocks_total,
        "kv_blocks_used": s.blocks_used,
        "kv_blocks_cached": s.blocks_cached,
        "host_blocks_total": s.host_blocks_total,
        "host_blocks_used": s.host_blocks_used,
        "host_blocks_cached": s.host_blocks_cached,
        "kv_waste_ratio": s.kv_waste,
        "prefix_cache_queries": c.prefix_queries,
        "prefix_cache_hits": c.prefix_hits,
        "blocks_copied": c.blocks_copied,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generated_tokens,
        "steps": stats.steps,
    }
    labelled: dict[str, Mapping[str, float]] = {
        "preemptions": {"swap": s.preemptions_swap, "recompute": s.preemptions_recompute},
        "evictions": {
            "demoted": c.evictions_demoted,
            "dropped": c.evictions_dropped,
            "host": c.host_evictions,
        },
        "swap_bytes": {
            "out": c.blocks_swapped_out * bytes_per_block,
            "in": c.blocks_swapped_in * bytes_per_block,
        },
        "swap_seconds": {"out": stats.swap_out_seconds, "in": stats.swap_in_seconds},
        "step_phase_seconds": stats.phase_seconds,
        "fallbacks": stats.fallbacks,
    }
    found: dict[str, Samples] = {name: {(): float(value)} for name, value in plain.items()}
    for name, values in labelled.items():
        found[name] = {(label,): float(value) for label, value in values.items()}
    return found
