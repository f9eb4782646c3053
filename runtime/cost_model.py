"""What a preemption costs: moving the blocks out and back, or computing the tokens again."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PreemptionCost"]


@dataclass(frozen=True, slots=True)
class PreemptionCost:
    """Rates of the device at hand. Both choices are priced in seconds of its time.

    swap       2 * blocks * bytes_per_block / link_bytes_per_second      out now, in later
    recompute  tokens / prefill_tokens_per_second
    """

    bytes_per_block: int
    link_bytes_per_second: float
    prefill_tokens_per_second: float

    def swap_seconds(self, num_blocks: int) -> float:
        return 2 * num_blocks * self.bytes_per_block / self.link_bytes_per_second

    def recompute_seconds(self, num_tokens: int) -> float:
        return num_tokens / self.prefill_tokens_per_second

    def swap_is_cheaper(self, num_blocks: int, num_tokens: int) -> bool:
        return self.swap_seconds(num_blocks) <= self.recompute_seconds(num_tokens)
