"""The scheduler at one moment: what metrics, pages and tests read. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from halyard.runtime.kv_manager import KVCounters

__all__ = ["SchedulerStats"]


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Queues and memory at one moment, and totals since the start."""

    num_running: int
    num_waiting: int  # swapped ones not included
    num_swapped: int
    blocks_total: int
    blocks_used: int  # referenced by sequences
    blocks_cached: int  # free, but findable by the prefix cache
    host_blocks_total: int
    host_blocks_used: int
    host_blocks_cached: int
    kv_waste: (
        float  # share of slots in used blocks that hold no token, averaged over every eighth step
    )
    preemptions_swap: int
    preemptions_recompute: int
    counters: KVCounters  # a copy
    out_of_memory: int = 0  # steps that the device's memory was too small for
    max_rows: int = 0  # most sequences of a step now: fewer after such a step, for a while
