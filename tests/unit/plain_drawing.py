"""What DrawingKernels and ChangingKernels say, row by row: stands in for a device's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PlainDrawing"]


class PlainDrawing:
    """Implements both; remembers how many rows were changed."""

    def __init__(self) -> None:
        self.changed = 0

    def draw(
        self, logits: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if rows is None:
            rows = torch.arange(columns.shape[1] if columns is not None else len(logits))
        own = logits[rows].float()
        bad = ~torch.isfinite(own.amax(-1))
        tokens = torch.where(own.isnan(), float("-inf"), own).argmax(-1)
        if columns is not None:
            for number, column in enumerate(columns.T.tolist()):
                if column[0] > 0 and not bad[number]:
                    tokens[number] = _one(own[number].double(), *column)
        return tokens, bad, tokens * 2 + bad

    def change(
        self,
        logits: Tensor,
        rows: Tensor,
        penalties: Tensor,
        slots: Tensor,
        counts: tuple[Tensor, Tensor] | None,
        masks: Tensor,
        allowed: Tensor | None,
    ) -> Tensor:
        self.changed += len(rows)
        work = logits[rows].float()
        for number, (slot, mask) in enumerate(zip(slots.tolist(), masks.tolist(), strict=True)):
            own = work[number]
            if slot >= 0:
                assert counts is not None
                seen, answered = counts[0][slot], counts[1][slot]
                repetition, frequency, presence = penalties[:, number]
                scaled = torch.where(own > 0, own / repetition, own * repetition)
                own = torch.where(seen, scaled, own) - frequency * answered
                own = own - presence * (answered > 0)
            if mask >= 0:
                assert allowed is not None
                bits = allowed[mask].view(torch.uint8)[:, None] >> torch.arange(8) & 1
                own = own.masked_fill(
                    (bits.view(-1)[: len(own)] == 0) & ~own.isnan(), float("-inf")
                )
            work[number] = own
        return work


def _one(
    logits: Tensor, temperature: float, top_p: float, min_p: float, top_k: float, number: float
) -> int:
    weights = ((logits - logits.max()) / temperature).exp()
    kept = weights > 0
    if 0 < top_k < len(weights):
        kept &= weights >= weights.topk(int(top_k)).values[-1]
    if top_p < 1:
        within = torch.where(kept, weights, 0.0)
        order = within.argsort(descending=True)
        before = within[order].cumsum(0) - within[order]
        fewest = max(int((before < top_p * within.sum()).sum()), 1)
        kept &= weights >= within[order[fewest - 1]]
    kept &= weights >= min_p
    sums = torch.where(kept, weights, 0.0).cumsum(0)
    passed = (kept & (sums > number * sums[-1])).nonzero()
    return int(passed[0]) if len(passed) else int(kept.nonzero()[-1])
