"""Logits become tokens, for all rows of a step at once.

Each row that samples draws one number from a counter-based generator keyed by (seed, answer,
position), so what a request draws doesn't depend on what else is in the batch. Rows that need no
penalties, filters or log-probabilities don't pay for those that do.

What can be done before the logits are there is done in `prepare`, on the host; `draw` only issues
work, so that it may run while the host goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halyard.hal.contract import DrawingKernels, GreedyKernels, MaskingKernels
from halyard.runtime.batcher import stage
from halyard.runtime.drawing import choose, uniform
from halyard.runtime.masks import Allowed, MaskRow, Masks
from halyard.runtime.samples import (
    BIASED,
    GUIDED,
    LEAST,
    PENALISED,
    RANDOM,
    SCORED,
    SampleRow,
    Samples,
)
from halyard.runtime.scores import Scores, score
from halyard.runtime.token_counts import CountUpdate, TokenCounts

__all__ = ["Draw", "SampledTokens", "Sampler"]

_COMMON = (torch.float32, torch.bfloat16)  # dtypes that GreedyKernels look through


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was drawn, still on the device."""

    token_ids: Tensor  # [rows] int64
    bad: Tensor  # [rows] bool: the row's logits were not numbers
    scored: NDArray[np.int64]  # positions of the rows that scores are of
    scores: Scores | None
    failures: dict[int, str] = field(default_factory=dict)  # by row: its token is void, and why
    codes: Tensor | None = None  # [rows] int64, 2 x token + bad, where the device's kernel wrote it


@dataclass(frozen=True, slots=True)
class Draw:
    """A step's samples, and what is known about them before there are logits."""

    samples: Samples
    flags: int  # of all rows together
    numbers: NDArray[np.float64] | None  # [rows] in [0, 1); None: all are greedy
    penalised: NDArray[np.int64]  # positions, as those below
    counts: CountUpdate | None  # of the penalised rows
    biases: NDArray[np.float64]  # [3, n] (position, token, what is added to its logit)
    forbidden: NDArray[np.int64]  # [2, n] (position, token that may not come yet)
    masks: Masks | None  # of guided rows

    @property
    def adjusts_logits(self) -> bool:
        """By penalties, biases or forbidden ends."""
        return bool(self.flags & (PENALISED | BIASED) or self.forbidden.shape[1])

    @property
    def changes_logits(self) -> bool:
        return self.adjusts_logits or bool(self.flags & GUIDED)


class Sampler:
    """Draws for one engine.

    Args:
        kernels: draw on the device, where it has kernels for that.
        masking: bar what grammars forbid, where there are kernels for that.
        greedy: draw what greedy rows draw, where there are kernels for that alone.
    """

    def __init__(
        self,
        vocab_size: int,
        kernels: DrawingKernels | None = None,
        masking: MaskingKernels | None = None,
        greedy: GreedyKernels | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._kernels = kernels
        self._greedy = greedy
        self._counts = TokenCounts(vocab_size)
        self._masking = masking
        self._masks: Masks | None = None  # of the last step that was drawn

    def lend(self) -> None:
        """Let the masks after the last step begin."""
        if self._masks is not None:
            self._masks.lend()
            self._masks = None

    def forget(self) -> None:
        """Count the tokens of penalised rows anew."""
        self._counts = TokenCounts(self.vocab_size)

    def prepare(self, samples: Samples) -> Draw:
        """What doesn't depend on logits; the masks that guided rows lack begin in their thread."""
        flags = int(np.bitwise_or.reduce(samples.records["flags"])) if len(samples) else 0
        nothing = np.empty(0, np.int64)
        penalised = samples.having(PENALISED) if flags & PENALISED else nothing
        counts = None
        if len(penalised):
            counts = self._counts.plan(
                [samples.sequences[number] for number in penalised],
                samples.positions[penalised].tolist(),
                samples.sources[penalised].tolist(),
            )
        return Draw(
            samples,
            flags,
            uniform(samples) if flags & RANDOM else None,
            penalised,
            counts,
            _biases(samples) if flags & BIASED else np.empty((3, 0)),
            _forbidden(samples) if flags & LEAST else np.empty((2, 0), np.int64),
            _begin_masks(samples) if flags & GUIDED else None,
        )

    def draw(self, logits: Tensor, draw: Draw, before: Tensor | None = None) -> SampledTokens:
        """Draw a token for each row from logits [num_logits, vocab] of any floating type.

        Args:
            before: what the step before sampled, if it is in flight.
        """
        samples, kernels = draw.samples, self._kernels
        scored = samples.having(SCORED) if draw.flags & SCORED else np.empty(0, np.int64)
        failures: dict[int, str] = {}
        if kernels is not None and not draw.changes_logits and not len(scored):
            found = self._draw_there(kernels, logits, draw, samples.identity)
            return SampledTokens(found[0], found[1], scored, None, codes=found[2])
        raw = logits
        if not samples.identity:
            raw = logits[torch.from_numpy(samples.logits_rows).to(logits.device)]
        plain = draw.numbers is None and not draw.changes_logits and not len(scored)
        if plain and self._greedy is not None and raw.dtype in _COMMON:
            tokens, peaks = self._greedy.largest(raw)
            return SampledTokens(tokens, ~torch.isfinite(peaks), scored, None)
        raw = raw.float()
        work = self._changed(raw, draw, before) if draw.adjusts_logits else raw
        if draw.masks is not None:
            allowed = draw.masks.result()
            self._masks = draw.masks
            failures = allowed.failures
            if work is logits or (work is raw and len(scored)):
                work = work.clone()  # what was given, or is wanted once more, stays
            self._mask(work, allowed, samples)
            if draw.forbidden.shape[1]:
                _free_ends(work, raw, allowed, samples)
        codes: Tensor | None = None
        if kernels is not None:
            tokens, bad, codes = self._draw_there(kernels, work, draw, True)
        else:
            tokens, peaks = choose(work, samples, draw.numbers)
            bad = ~torch.isfinite(raw.amax(dim=-1) if draw.adjusts_logits else peaks)
        scores = None
        if len(scored):
            index = torch.from_numpy(scored).to(raw.device)
            asked = [samples.sequences[number].request.params.logprobs or 0 for number in scored]
            scores = score(raw[index], tokens[index], max(asked))
        return SampledTokens(tokens, bad, scored, scores, failures, codes)

    def sample(self, logits: Tensor, rows: Iterable[SampleRow]) -> SampledTokens:
        """`prepare` and `draw` for rows given one by one."""
        return self.draw(logits, self.prepare(Samples.of(rows, logits.shape[0])))

    def _draw_there(
        self, kernels: DrawingKernels, logits: Tensor, draw: Draw, identity: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples, records = draw.samples, draw.samples.records
        index = None if identity else samples.logits_rows
        if draw.numbers is None:
            rows = None if index is None else stage([index], logits.device)[0]
            return kernels.draw(logits, rows, None)
        random = (records["flags"] & RANDOM) != 0
        columns = np.stack(
            [
                np.where(random, records["temperature"], 0.0),
                records["top_p"],
                records["min_p"],
                records["top_k"],
                draw.numbers,
            ]
        ).astype(np.float32)
        columns[4] = np.minimum(columns[4], np.float32(1 - 2.0**-24))  # below 1 when rounded
        on = stage([columns] if index is None else [columns, index], logits.device)
        return kernels.draw(logits, None if index is None else on[1], on[0])

    def _changed(self, raw: Tensor, draw: Draw, before: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab] with penalties, biases and forbidden ends."""
        logits, device = raw.clone(), raw.device
        if draw.counts is not None:
            seen, answered = self._counts.apply(draw.counts, device, before)
            index = torch.from_numpy(draw.penalised).to(device)
            params = [draw.samples.sequences[n].request.params for n in draw.penalised]

            def column(name: str) -> Tensor:
                values = [getattr(own, name) for own in params]
                return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

            part, repetition = logits[index], column("repetition_penalty")
            scaled = torch.where(part > 0, part / repetition, part * repetition)
            part = torch.where(seen, scaled, part)
            part -= column("frequency_penalty") * answered
            part -= column("presence_penalty") * (answered > 0)
            logits[index] = part
        if draw.biases.shape[1]:
            positions, tokens = torch.from_numpy(draw.biases[:2].astype(np.int64)).to(device)
            bias = torch.from_numpy(draw.biases[2].astype(np.float32)).to(device)
            logits.index_put_((positions, tokens), bias, accumulate=True)
        if draw.forbidden.shape[1]:
            positions, tokens = torch.from_numpy(draw.forbidden).to(device)
            logits[positions, tokens] = float("-inf")
        return logits

    def _mask(self, work: Tensor, allowed: Allowed, samples: Samples) -> None:
        """Bar from `work` [rows, vocab] what the grammars forbid: its logits become -inf.

        A number that is none stays none where a grammar forbids its token.
        """
        bits, positions = allowed.bits, allowed.positions
        places = None if len(positions) == len(samples) else torch.tensor(positions)
        if self._masking is not None:
            self._masking.bar(work, torch.from_numpy(bits), places)
        else:
            barred = torch.zeros_like(work[: len(positions)])
            barred.masked_fill_(_forbidden_by(bits, work), float("-inf"))
            if places is None:
                work += barred
            else:
                work.index_add_(0, places.to(work.device), barred)


def _free_ends(work: Tensor, raw: Tensor, allowed: Allowed, samples: Samples) -> None:
    """min_tokens may have forbidden the one thing that a complete answer allows: its end."""
    short = samples.positions < samples.records["least"]
    for number, position in enumerate(allowed.positions):
        if short[position] and not torch.isfinite(work[position].amax()):
            forbidden = _forbidden_by(allowed.bits[number : number + 1], work)[0]
            work[position] = raw[position].masked_fill(forbidden, float("-inf"))


def _forbidden_by(allowed: NDArray[np.uint8], logits: Tensor) -> Tensor:
    """[rows, vocab] bool, unpacked where the logits are."""
    packed = torch.from_numpy(allowed).to(logits.device)
    places = torch.arange(8, device=logits.device, dtype=torch.uint8)
    bits = packed[:, :, None].bitwise_right_shift(places).bitwise_and_(1)
    return bits.view(len(allowed), -1)[:, : logits.shape[-1]] == 0


def _biases(samples: Samples) -> NDArray[np.float64]:
    found = [
        (position, token, bias)
        for position in samples.having(BIASED).tolist()
        for token, bias in (samples.sequences[position].request.params.logit_bias or {}).items()
    ]
    return np.array(found, np.float64).reshape(-1, 3).T


def _forbidden(samples: Samples) -> NDArray[np.int64]:
    short = (samples.records["flags"] & LEAST != 0) & (samples.positions < samples.records["least"])
    found = [
        (position, token)
        for position in np.flatnonzero(short).tolist()
        for token in samples.sequences[position].ends
    ]
    return np.ascontiguousarray(np.array(found, np.int64).reshape(-1, 2).T)


def _begin_masks(samples: Samples) -> Masks | None:
    answers, guided = samples.answers.tolist(), []
    for position in samples.having(GUIDED).tolist():
        sequence = samples.sequences[position]
        guidance = sequence.request.guidance
        if guidance is not None:
            tokens, num_prompt = sequence.token_ids, sequence.num_prompt_tokens
            guided.append(MaskRow(position, guidance, answers[position], tokens, num_prompt))
    return guided[0].guidance.maker.begin(guided) if guided else None
