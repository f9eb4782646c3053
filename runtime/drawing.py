"""Draws tokens from logits with plain torch: greedy, by inverse distribution, and filtered.

A device's own kernels may take its place (hal.contract.DrawingKernels).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halyard.runtime.samples import FILTERED, RANDOM, Samples

__all__ = ["argmax", "choose", "uniform"]

_CANDIDATES = (256, 4096)  # most likely tokens looked at before the whole vocabulary is sorted
_CHUNK = 256  # tokens whose weights are summed before they are looked at one by one
_LOG2_E = 1.4426950408889634
_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniform(samples: Samples) -> NDArray[np.float64]:
    """One number in [0, 1) a row: a hash (splitmix64's finaliser) of seed, answer and position."""
    one = np.uint64(1)
    with np.errstate(over="ignore"):
        answers = samples.answers.astype(np.uint64) + one
        state = _mix(samples.records["seed"] + _STEP * answers)
        state = _mix(state + _STEP * (samples.positions.astype(np.uint64) + one))
    numbers: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def choose(
    logits: Tensor, samples: Samples, numbers: NDArray[np.float64] | None
) -> tuple[Tensor, Tensor]:
    """One token a row of logits [rows, vocab] fp32, and each row's largest logit (NaN if it has one).

    Args:
        numbers: [rows] in [0, 1), if some row is random.
    Returns:
        [rows] int64 and [rows] fp32.
    """
    tokens = argmax(logits)
    peaks = logits.gather(1, tokens[:, None])[:, 0]
    if numbers is None:
        return tokens, peaks
    flags = samples.records["flags"]
    random = (flags & RANDOM) != 0
    filtered = random & ((flags & FILTERED) != 0)
    for rows, draw in ((random & ~filtered, _draw_free), (filtered, _draw_filtered)):
        if rows.all():
            return draw(logits, _Columns.of(samples, numbers, slice(None), logits)), peaks
        if rows.any():
            index = torch.from_numpy(np.flatnonzero(rows)).to(logits.device)
            tokens[index] = draw(logits[index], _Columns.of(samples, numbers, rows, logits))
    return tokens, peaks


def argmax(logits: Tensor) -> Tensor:
    """The first largest of each row; NaN counts as the largest."""
    if logits.device.type == "cpu":  # numpy's takes a tenth of torch's time there
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Parameters of random rows, [rows, 1] each, on the logits' device."""

    temperature: Tensor  # fp32
    top_k: Tensor  # int64, the vocabulary's size where there is none
    top_p: Tensor  # fp64
    min_p: Tensor  # fp64
    numbers: Tensor  # fp64

    @classmethod
    def of(
        cls, samples: Samples, numbers: NDArray[np.float64], rows: slice | NDArray[np.bool_],
        logits: Tensor,
    ) -> _Columns:  # fmt: skip
        records, vocab = samples.records[rows], logits.shape[-1]
        top_k = np.where(records["top_k"] > 0, np.minimum(records["top_k"], vocab), vocab)

        def column(values: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(logits.device)[:, None]

        return cls(
            column(records["temperature"].astype(np.float32)),
            column(top_k),
            column(records["top_p"]),
            column(records["min_p"]),
            column(numbers[rows]),
        )


def _weights(logits: Tensor, own: _Columns) -> Tensor:
    """Relative to the most likely token: [rows, vocab] fp32."""
    peak = logits.amax(dim=-1, keepdim=True)
    # torch's exp on a CPU takes up to a hundred times as long where results are too small for fp32.
    return (logits - peak).mul_(_LOG2_E / own.temperature).exp2_()


def _draw_free(logits: Tensor, own: _Columns) -> Tensor:
    """By inverse distribution in vocabulary order: the chunk first, then the token in it."""
    weight = _weights(logits, own)
    rows, vocab = weight.shape
    chunks = -(-vocab // _CHUNK)
    if vocab % _CHUNK:
        weight = torch.nn.functional.pad(weight, (0, chunks * _CHUNK - vocab))
    weight = weight.view(rows, chunks, _CHUNK)
    until = weight.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    goal = own.numbers * until[:, -1:]
    chunk, rest = _find(until, goal)
    inside = weight.gather(1, chunk[:, :, None].expand(rows, 1, _CHUNK))[:, 0]
    within, _ = _find(inside.cumsum(dim=-1, dtype=torch.float64), rest)
    return (chunk * _CHUNK + within).clamp_(max=vocab - 1)[:, 0]


def _find(cumulative: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The first place [rows, 1] whose sum is beyond the goal, and what of the goal is left there."""
    place = torch.searchsorted(cumulative, goal, right=True)
    # Rounding may take the goal past the end: then the last token that can come.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    place = torch.minimum(place, last).clamp_(max=cumulative.shape[-1] - 1)  # NaN: beyond all
    before = torch.where(place > 0, cumulative.gather(1, (place - 1).clamp(min=0)), 0.0)
    return place, goal - before


def _draw_filtered(logits: Tensor, own: _Columns) -> Tensor:
    """By inverse distribution from the most likely tokens down.

    Filters apply in the usual order: temperature, top_k, top_p, min_p. The vocabulary is sorted in
    full only for rows whose kept tokens may reach beyond the first candidates.
    """
    device, vocab = logits.device, logits.shape[-1]
    weight = _weights(logits, own)
    total = weight.sum(dim=-1, keepdim=True, dtype=torch.float64)

    def pick(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tokens for `rows` from their `count` most likely ones; which rows that decided."""
        best, ids = weight[rows].topk(count, dim=-1)
        best, top_k = best.double(), own.top_k[rows]
        in_k = torch.arange(count, device=device)[None, :] < top_k
        # top_p counts within what top_k left: its total is known if top_k ends in reach.
        mass = torch.where(in_k, best, 0.0).sum(dim=-1, keepdim=True)
        whole = torch.where(top_k <= count, mass, total[rows])
        before = best.cumsum(dim=-1) - best
        keep = in_k & (before < own.top_p[rows] * whole) & (best >= own.min_p[rows])
        keep[:, 0] = True
        kept = torch.where(keep, best, 0.0)
        decided = ~keep[:, -1] | (count == vocab) | (top_k[:, 0] <= count)
        cumulative = kept.cumsum(dim=-1)
        goal = own.numbers[rows] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, goal, right=True)
        last = keep.sum(dim=-1, keepdim=True) - 1  # kept tokens are a prefix
        return ids.gather(1, torch.minimum(place, last))[:, 0], decided

    chosen = torch.empty(len(logits), dtype=torch.int64, device=device)
    left = torch.arange(len(logits), device=device)
    for count in (*(few for few in _CANDIDATES if few < vocab), vocab):
        if len(left):
            chosen[left], decided = pick(left, count)
            left = left[~decided]
    return chosen
