"""Logits become tokens, for all rows of a step at once.

Each row that samples draws one number from a counter-based generator keyed by (seed, answer,
position), so what a request draws doesn't depend on what else is in the batch. Rows that need no
penalties, filters or log-probabilities don't pay for those that do.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from halyard.runtime.batcher import SampleRow
from halyard.runtime.guided import MaskRow, Masks
from halyard.runtime.plan import TokenLogprob
from halyard.runtime.request import SamplingParams
from halyard.runtime.sequence import Sequence

__all__ = ["SampledTokens", "Sampler", "score_tokens", "uniform"]

_CANDIDATES = (256, 4096)  # most likely tokens looked at before the whole vocabulary is sorted
_SCORE_ROWS = 256  # rows of log-softmax at a time: bounds memory for prompt log-probabilities


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was drawn, still on the device."""

    token_ids: Tensor  # [rows] int64
    bad: Tensor  # [rows] bool: the row's logits were not numbers
    logprobs: tuple[TokenLogprob | None, ...]  # where asked for
    failures: dict[int, str] = field(default_factory=dict)  # by row: its token is void, and why


class Sampler:
    """Stateless: what penalties need is read from the sequences."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def begin(self, rows: Rows[SampleRow]) -> Future[Masks] | None:
        """Start on what doesn't depend on logits: the masks of guided rows. None if there are none."""
        guided = []
        for position, row in enumerate(rows):
            sequence = row.row.sequence
            guidance = sequence.request.guidance
            if guidance is not None:
                answer = sequence.token_ids[sequence.num_prompt_tokens :]
                guided.append(MaskRow(position, guidance, row.answer_index, answer))
        return guided[0].guidance.compiler.begin(guided) if guided else None

    def sample(
        self, logits: Tensor, rows: Rows[SampleRow], masks: Future[Masks] | None = None
    ) -> SampledTokens:
        """Draw a token for each row from logits [num_logits, vocab] (row.logits_row names its own).

        Args:
            masks: what `begin` returned for these rows; it is called here if nobody has.
        """
        masks = masks or self.begin(rows)
        index = torch.tensor([row.logits_row for row in rows], device=logits.device)
        identity = logits.shape[0] == len(rows) and all(
            row.logits_row == position for position, row in enumerate(rows)
        )
        raw = (logits if identity else logits[index]).float()
        bad = ~torch.isfinite(raw.amax(dim=-1))
        params = [row.row.sequence.request.params for row in rows]
        work = raw
        changed = [i for i, row in enumerate(rows) if _changes_logits(row, params[i])]
        if changed:
            work = raw.clone()
            work[changed] = self._penalised(raw[changed], [rows[i] for i in changed])
        failures: dict[int, str] = {}
        if masks is not None:
            allowed = masks.result()
            failures = allowed.failures
            work = _masked(work, raw, allowed, rows)
        tokens = work.argmax(dim=-1)
        random = [i for i, own in enumerate(params) if own.temperature > 0]
        if random:
            chosen = _draw(
                work if len(random) == len(rows) else work[random],
                [params[i] for i in random],
                uniform([rows[i] for i in random]),
            )
            if len(random) == len(rows):
                tokens = chosen
            else:
                tokens[random] = chosen
        return SampledTokens(tokens, bad, self._logprobs(raw, tokens, params), failures)

    def _penalised(self, logits: Tensor, rows: list[SampleRow]) -> Tensor:
        """Apply penalties, biases and forbidden ends to logits [len(rows), vocab]."""
        logits = logits.clone()
        device = logits.device
        params = [row.row.sequence.request.params for row in rows]

        penalised = [i for i, own in enumerate(params) if _has_penalties(own)]
        if penalised:
            part = logits[penalised]
            answered = torch.zeros(part.shape, device=device)
            seen = torch.zeros(part.shape, dtype=torch.bool, device=device)
            for position, i in enumerate(penalised):
                sequence = rows[i].row.sequence
                tokens = torch.tensor(sequence.token_ids, device=device)
                seen[position, tokens] = True
                answer = tokens[sequence.num_prompt_tokens :]
                answered[position].index_add_(0, answer, torch.ones(answer.shape, device=device))

            def column(name: str) -> Tensor:
                values = [getattr(params[i], name) for i in penalised]
                return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

            repetition = column("repetition_penalty")
            scaled = torch.where(part > 0, part / repetition, part * repetition)
            part = torch.where(seen, scaled, part)
            part -= column("frequency_penalty") * answered
            part -= column("presence_penalty") * (answered > 0)
            logits[penalised] = part
        for i, (row, own) in enumerate(zip(rows, params, strict=True)):
            if own.logit_bias:
                tokens = torch.tensor(list(own.logit_bias), device=device)
                bias = torch.tensor(list(own.logit_bias.values()), device=device)
                logits[i].index_add_(0, tokens, bias.float())
            if row.row.sequence.num_answer_tokens < own.min_tokens:
                ends = _end_tokens(row.row.sequence)
                if ends:
                    logits[i, torch.tensor(ends, device=device)] = float("-inf")
        return logits

    def _logprobs(
        self, raw: Tensor, tokens: Tensor, params: list[SamplingParams]
    ) -> tuple[TokenLogprob | None, ...]:
        asking = [i for i, own in enumerate(params) if own.logprobs is not None]
        found: list[TokenLogprob | None] = [None] * len(params)
        if asking:
            tops = [params[i].logprobs or 0 for i in asking]
            for i, scored in zip(
                asking, score_tokens(raw[asking], tokens[asking], tops), strict=True
            ):
                found[i] = scored
        return tuple(found)


def _masked(work: Tensor, raw: Tensor, masks: Masks, rows: Rows[SampleRow]) -> Tensor:
    """Logits [rows, vocab] where only what the grammars allow can be drawn."""
    device = work.device
    forbidden = ~torch.from_numpy(masks.allowed).to(device)
    if len(masks.positions) == len(rows):
        own, masked = raw, work.masked_fill(forbidden, float("-inf"))
    else:
        index = torch.tensor(masks.positions, device=device)
        own = raw[index]
        part = work[index].masked_fill(forbidden, float("-inf"))
        masked = work.index_put((index,), part)
    # min_tokens may forbid the one thing that a complete answer allows: its end.
    for number, position in enumerate(masks.positions):
        sequence = rows[position].row.sequence
        if sequence.num_answer_tokens < sequence.request.params.min_tokens and not torch.isfinite(
            masked[position].amax()
        ):
            masked[position] = own[number].masked_fill(forbidden[number], float("-inf"))
    return masked


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    )


def _changes_logits(row: SampleRow, params: SamplingParams) -> bool:
    return (
        _has_penalties(params)
        or bool(params.logit_bias)
        or row.row.sequence.num_answer_tokens < params.min_tokens
    )


def _end_tokens(sequence: Sequence) -> list[int]:
    request = sequence.request
    ends = set(request.stop_token_ids)
    if not request.params.ignore_eos:
        ends |= request.eos_token_ids
    return sorted(ends)


def uniform(rows: Rows[SampleRow]) -> Tensor:
    """One number in [0, 1) a row: a hash (splitmix64's finaliser) of seed, answer and position."""
    keys = [
        (row.row.sequence.request.seed, row.answer_index, len(row.row.sequence.token_ids))
        for row in rows
    ]
    seed, answer, position = (
        np.array([key[i] % 2**64 for key in keys], dtype=np.uint64) for i in range(3)
    )
    with np.errstate(over="ignore"):
        state = _mix(seed + np.uint64(0x9E3779B97F4A7C15) * (answer + np.uint64(1)))
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15) * (position + np.uint64(1)))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def _draw(logits: Tensor, params: list[SamplingParams], numbers: Tensor) -> Tensor:
    """Draw by inverse distribution from the most likely tokens down.

    Filters apply in the usual order: temperature, top_k, top_p, min_p. The vocabulary is sorted in
    full only for rows whose kept tokens may reach beyond the first candidates.
    """
    device, vocab = logits.device, logits.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    temperature = column([own.temperature for own in params])
    scaled = logits.double() / temperature
    peak = scaled.amax(dim=-1, keepdim=True)
    weight = (scaled - peak).exp()  # relative to the most likely token
    total = weight.sum(dim=-1, keepdim=True)
    top_k = torch.tensor(
        [min(own.top_k, vocab) if own.top_k > 0 else vocab for own in params], device=device
    )[:, None]
    top_p = column([own.top_p for own in params])
    min_p = column([own.min_p for own in params])
    threshold = numbers.to(device)[:, None]

    def pick(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tokens for `rows` from their `count` most likely ones; which rows that decided."""
        best, ids = weight[rows].topk(count, dim=-1)
        rank = torch.arange(count, device=device)[None, :]
        in_k = rank < top_k[rows]
        # top_p counts within what top_k left: its total is known if top_k ends in reach.
        mass = torch.where(in_k, best, 0.0).sum(dim=-1, keepdim=True)
        whole = torch.where(top_k[rows] <= count, mass, total[rows])
        before = best.cumsum(dim=-1) - best
        keep = in_k & (before < top_p[rows] * whole) & (best >= min_p[rows])
        keep[:, 0] = True
        kept = torch.where(keep, best, 0.0)
        decided = ~keep[:, -1] | (count == vocab)
        cumulative = kept.cumsum(dim=-1)
        goal = threshold[rows] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, goal, right=True)
        last = keep.sum(dim=-1, keepdim=True) - 1  # kept tokens are a prefix
        return ids.gather(1, torch.minimum(place, last))[:, 0], decided

    chosen = torch.empty(len(params), dtype=torch.int64, device=device)
    free = [i for i, own in enumerate(params) if not _filters(own, vocab)]
    if free:  # any order of the tokens serves, so nothing is sorted
        chosen[free] = _draw_unfiltered(weight[free], threshold[free])
    left = torch.tensor(
        [i for i, own in enumerate(params) if _filters(own, vocab)],
        dtype=torch.int64,
        device=device,
    )
    for count in (*(few for few in _CANDIDATES if few < vocab), vocab):
        if len(left):
            chosen[left], decided = pick(left, count)
            left = left[~decided]
    return chosen


def _filters(params: SamplingParams, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1 or params.min_p > 0


def _draw_unfiltered(weight: Tensor, numbers: Tensor) -> Tensor:
    """Tokens by inverse distribution over weight [rows, vocab] in vocabulary order."""
    cumulative = weight.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, numbers * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last token that can come
    return torch.minimum(place, last)[:, 0]


def score_tokens(logits: Tensor, token_ids: Tensor, num_top: Rows[int]) -> list[TokenLogprob]:
    """Log-probability and rank of token_ids [rows] under logits [rows, vocab], and the best few."""
    scored: list[TokenLogprob] = []
    width = min(max(num_top, default=0), logits.shape[-1])
    for start in range(0, logits.shape[0], _SCORE_ROWS):
        part = logits[start : start + _SCORE_ROWS].float().log_softmax(dim=-1)
        ids = token_ids[start : start + _SCORE_ROWS]
        own = part.gather(1, ids[:, None])
        ranks = (part > own).sum(dim=-1) + 1
        best, best_ids = part.topk(width, dim=-1)
        for row, (token, logprob, rank, values, tops) in enumerate(
            zip(ids.tolist(), own[:, 0].tolist(), ranks.tolist(), best.tolist(), best_ids.tolist(),
                strict=True)
        ):  # fmt: skip
            count = num_top[start + row]
            pairs = tuple(zip(tops[:count], values[:count], strict=True))
            scored.append(TokenLogprob(token, logprob, rank, pairs))
    return scored
