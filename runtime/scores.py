"""Log-probabilities of tokens: computed on the device, brought to the host when somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from halyard.runtime.plan import TokenLogprob

__all__ = ["Scores", "score"]

_PIECE = 256  # tokens whose largest is looked at before they are
_SCORE_ROWS = 256  # rows of log-softmax at a time: bounds memory for prompt log-probabilities


@dataclass(frozen=True, slots=True)
class Scores:
    """Of some rows, where they were computed."""

    token_ids: Tensor  # [rows] int64
    logprobs: Tensor  # [rows] fp32
    ranks: Tensor  # [rows] int64, 1: the most likely token
    best: Tensor  # [rows, width] fp32, the most likely ones, best first
    best_ids: Tensor  # [rows, width] int64

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All fields, in order."""
        return self.token_ids, self.logprobs, self.ranks, self.best, self.best_ids

    def listed(self, num_top: Rows[int]) -> list[TokenLogprob]:
        """One a row, with its first `num_top` [rows] alternatives."""
        return [
            TokenLogprob(token, logprob, rank, tuple(zip(ids[:count], best[:count], strict=True)))
            for count, (token, logprob, rank, best, ids) in zip(
                num_top,
                zip(*(column.tolist() for column in self.columns), strict=True),
                strict=True,
            )
        ]


def score(logits: Tensor, token_ids: Tensor, width: int) -> Scores:
    """Score token_ids [rows] under logits [rows, vocab], with the `width` most likely tokens."""
    width = min(width, logits.shape[-1])
    parts = []
    for start in range(0, logits.shape[0], _SCORE_ROWS):
        part = logits[start : start + _SCORE_ROWS].float().log_softmax(dim=-1)
        own = part.gather(1, token_ids[start : start + _SCORE_ROWS, None])
        ranks = (part > own).sum(dim=-1) + 1
        parts.append((own[:, 0], ranks, *_largest(part, width)))
    return Scores(token_ids, *(torch.cat(column) for column in zip(*parts, strict=True)))


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As values.topk(count): [rows, count] the largest of each row [rows, any], best first, and where.

    They are in the `count` pieces whose largest are largest, so a row is read once, and little is sorted.
    """
    rows, width = values.shape
    pieces = width // _PIECE
    if pieces <= 2 * count:
        best, where = values.topk(count, dim=-1)
        return best, where
    whole = values[:, : pieces * _PIECE].view(rows, pieces, _PIECE)
    chosen = whole.amax(dim=-1).topk(count, dim=-1).indices
    inside = torch.arange(_PIECE, device=values.device)
    places = (chosen[:, :, None] * _PIECE + inside).view(rows, -1)
    rest = torch.arange(pieces * _PIECE, width, device=values.device).expand(rows, -1)
    places = torch.cat((places, rest), dim=1)
    best, at = values.gather(1, places).topk(count, dim=-1)
    return best, places.gather(1, at)
