"""Logits become tokens, for all rows of a step at once.

Each row that samples draws one number from a counter-based generator keyed by (seed, answer,
position), so what a request draws doesn't depend on what else is in the batch. Rows that need no
penalties, filters or log-probabilities don't pay for those that do.

What can be done before the logits are there is done in `prepare`, on the host; `draw` only issues
work, so that it may run while the host goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halyard.hal.contract import (
    ChangingKernels,
    DrawingKernels,
    GreedyKernels,
    MaskingKernels,
)
from halyard.runtime.batcher import send, stage
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
    penalties: NDArray[np.float32]  # [3, penalised rows] repetition, frequency, presence
    counts: CountUpdate | None  # of the penalised rows
    biases: NDArray[np.float64]  # [3, n] (position, token, what is added to its logit)
    forbidden: NDArray[np.int64]  # [2, n] (position, token that may not come yet)
    masks: Masks | None  # of guided rows
    waits: bool = False  # its masks begin when the step before has told its tokens: see complete

    @property
    def adjusts_logits(self) -> bool:
        """By penalties, biases or forbidden ends."""
        return bool(self.flags & (PENALISED | BIASED) or self.forbidden.shape[1])

    @property
    def changes_logits(self) -> bool:
        return self.adjusts_logits or bool(self.flags & GUIDED)

    @property
    def changed(self) -> NDArray[np.int64]:
        """Positions of the rows whose logits it changes."""
        rows = self.samples.records["flags"] & (PENALISED | BIASED | GUIDED) != 0
        rows[self.forbidden[0]] = True
        found: NDArray[np.int64] = np.flatnonzero(rows)
        return found


class Sampler:
    """Draws for one engine.

    Args:
        kernels: draw on the device, where it has kernels for that; they may change logits there, too.
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
        self._changing = kernels if isinstance(kernels, ChangingKernels) else None
        self._greedy = greedy
        self._counts = TokenCounts(vocab_size)
        self._masking = masking

    def forget(self) -> None:
        """Count the tokens of penalised rows anew."""
        self._counts = TokenCounts(self.vocab_size)

    def prepare(self, samples: Samples) -> Draw:
        """What doesn't depend on logits; the masks that guided rows lack begin in their thread, where
        their last tokens are known."""
        flags = int(np.bitwise_or.reduce(samples.records["flags"])) if len(samples) else 0
        waits = bool(flags & GUIDED and (samples.sources[samples.having(GUIDED)] >= 0).any())
        penalised = samples.having(PENALISED) if flags & PENALISED else np.empty(0, np.int64)
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
            _penalties(samples, penalised),
            counts,
            _biases(samples) if flags & BIASED else np.empty((3, 0)),
            _forbidden(samples) if flags & LEAST else np.empty((2, 0), np.int64),
            _begin_masks(samples) if flags & GUIDED and not waits else None,
            waits,
        )

    def complete(self, draw: Draw) -> Draw:
        """A draw that waits, once the step before has told its tokens: its masks begin."""
        return replace(draw, masks=_begin_masks(draw.samples), waits=False) if draw.waits else draw

    def draw(self, logits: Tensor, draw: Draw, before: Tensor | None = None) -> SampledTokens:
        """Draw a token for each row from logits [num_logits, vocab] of any floating type.

        Args:
            before: what the step before sampled, if it is in flight.
        """
        if self._kernels is not None and (self._changing is not None or not draw.changes_logits):
            return self._draw_there(self._kernels, logits, draw, before)
        samples, kernels = draw.samples, self._kernels
        scored = samples.having(SCORED) if draw.flags & SCORED else np.empty(0, np.int64)
        failures: dict[int, str] = {}
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
            failures = allowed.failures
            if work is logits or (work is raw and len(scored)):
                work = work.clone()  # what was given, or is wanted once more, stays
            self._mask(work, allowed, samples)
            if draw.forbidden.shape[1]:
                _free_ends(work, raw, allowed, samples)
        codes: Tensor | None = None
        if kernels is not None:
            columns = None if draw.numbers is None else stage([_columns(draw)], work.device)[0]
            tokens, bad, codes = kernels.draw(work, None, columns)
        else:
            tokens, peaks = choose(work, samples, draw.numbers)
            bad = ~torch.isfinite(raw.amax(dim=-1) if draw.adjusts_logits else peaks)
        scores = None
        if len(scored):
            index = torch.from_numpy(scored).to(raw.device)
            scores = score(raw[index], tokens[index], _most_alternatives(samples, scored))
        return SampledTokens(tokens, bad, scored, scores, failures, codes)

    def _draw_there(
        self, kernels: DrawingKernels, logits: Tensor, draw: Draw, before: Tensor | None
    ) -> SampledTokens:
        """By kernels of the device, for which the host never waits. Rows whose logits are changed are
        drawn from a copy that holds them alone."""
        samples, device = draw.samples, logits.device
        failures: dict[int, str] = {}
        if not draw.changes_logits:
            index = None if samples.identity else stage([samples.logits_rows], device)[0]
            columns = None if draw.numbers is None else stage([_columns(draw)], device)[0]
            tokens, bad, codes = kernels.draw(logits, index, columns)
        else:
            changed = draw.changed
            rows = np.ones(len(samples), bool)
            rows[changed] = False
            plain = np.flatnonzero(rows)
            # One piece goes up: of the plain rows and the changed ones what is drawn by, and what is
            # drawn of both in the rows' order.
            order = np.empty(len(samples), np.int64)
            order[plain] = np.arange(len(plain))
            order[changed] = np.arange(len(plain), len(order))
            arrays: list[NDArray[Any]] = [samples.logits_rows[plain], order]
            if draw.numbers is not None:
                arrays += [_columns(draw, plain), _columns(draw, changed)]
            work, failures, staged = self._changed_there(logits, draw, changed, before, arrays)
            index, places = staged[:2]
            by_plain, by_changed = staged[2:] or (None, None)
            tokens, bad, codes = kernels.draw(work, None, by_changed)
            if len(plain):
                others = kernels.draw(logits, index, by_plain)[2]
                codes = torch.cat((others, codes)).index_select(0, places)
                tokens, bad = codes >> 1, (codes & 1).bool()
        scored = samples.having(SCORED) if draw.flags & SCORED else np.empty(0, np.int64)
        scores = None
        if len(scored):
            index, own = stage([samples.logits_rows[scored], scored], device)
            width = _most_alternatives(samples, scored)
            scores = score(logits.index_select(0, index), tokens.index_select(0, own), width)
        return SampledTokens(tokens, bad, scored, scores, failures, codes)

    def _changed_there(
        self,
        logits: Tensor,
        draw: Draw,
        changed: NDArray[np.int64],
        before: Tensor | None,
        arrays: Rows[NDArray[Any]] = (),
    ) -> tuple[Tensor, dict[int, str], list[Tensor]]:
        """Logits [changed rows, vocab] fp32 with penalties, biases, forbidden ends and masks; which rows'
        grammars broke down; and the arrays, which go up with what this needs."""
        assert self._changing is not None
        samples, device, vocab = draw.samples, logits.device, logits.shape[-1]
        place = np.zeros(len(samples), np.int64)
        place[changed] = np.arange(len(changed))
        penalties = np.zeros((3, len(changed)), np.float32)
        slots, lines = np.full((2, len(changed)), -1, np.int64)
        counted: list[NDArray[np.int64]] = []
        if draw.counts is not None:
            counted = self._counts.places(draw.counts)
            slots[place[draw.penalised]] = draw.counts.slots
            penalties[:, place[draw.penalised]] = draw.penalties
        masks: Tensor | None = None
        failures: dict[int, str] = {}
        guided = np.empty(0, np.int64)
        if draw.masks is not None:
            allowed = draw.masks.result()
            failures, masks = allowed.failures, send(allowed.bits.view(np.int32), device)
            guided = place[allowed.positions]
            lines[guided] = np.arange(len(guided))
        biased = place[draw.biases[0].astype(np.int64)] * vocab + draw.biases[1].astype(np.int64)
        barred = place[draw.forbidden[0]] * vocab + draw.forbidden[1]
        own = [samples.logits_rows[changed], slots, lines, penalties,
               biased, draw.biases[2].astype(np.float32), barred]  # fmt: skip
        staged = stage([*own, *counted, *arrays], device)
        index, on_slots, on_lines, on_penalties, at, biases, ends = staged[: len(own)]
        del staged[: len(own)]
        counts: tuple[Tensor, Tensor] | None = None
        if draw.counts is not None:
            counts = self._counts.apply(draw.counts, staged[: len(counted)], before)
            del staged[: len(counted)]
        change = self._changing.change
        work = change(logits, index, on_penalties, on_slots, counts, on_lines, masks)
        if len(at):
            work.view(-1).scatter_add_(0, at, biases)  # each token of a row once
        if len(ends):
            work.view(-1).index_fill_(0, ends, float("-inf"))
            short = samples.positions < samples.records["least"]
            kept = guided[short[changed[guided]]]
            if len(kept):  # it may have been the one thing that a complete answer allows
                own_rows = samples.logits_rows[changed[kept]]
                none = np.full(len(kept), -1, np.int64)
                at, index, on_slots, on_lines = stage([kept, own_rows, none, lines[kept]], device)
                free = change(logits, index, on_penalties, on_slots, None, on_lines, masks)
                left = work.index_select(0, at)
                dead = ~torch.isfinite(left.amax(dim=-1, keepdim=True))
                work.index_copy_(0, at, torch.where(dead, free, left))
        return work, failures, staged

    def sample(self, logits: Tensor, rows: Iterable[SampleRow]) -> SampledTokens:
        """`prepare` and `draw` for rows given one by one."""
        return self.draw(logits, self.prepare(Samples.of(rows, logits.shape[0])))

    def _changed(self, raw: Tensor, draw: Draw, before: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab] with penalties, biases and forbidden ends."""
        logits, device = raw.clone(), raw.device
        if draw.counts is not None:
            places = stage(self._counts.places(draw.counts), device)
            tables = self._counts.apply(draw.counts, places, before)
            slots = torch.from_numpy(draw.counts.slots).to(device)
            seen, answered = (table[slots] for table in tables)
            index = torch.from_numpy(draw.penalised).to(device)
            repetition, frequency, presence = torch.from_numpy(draw.penalties).to(device)[..., None]
            part = logits[index]
            scaled = torch.where(part > 0, part / repetition, part * repetition)
            part = torch.where(seen, scaled, part)
            part -= frequency * answered
            part -= presence * (answered > 0)
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


def _columns(draw: Draw, which: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
    """What DrawingKernels.draw takes of all samples, or of some, where some are random."""
    assert draw.numbers is not None
    records, numbers = draw.samples.records[which], draw.numbers[which]
    random = (records["flags"] & RANDOM) != 0
    columns = np.stack(
        [
            np.where(random, records["temperature"], 0.0),
            records["top_p"],
            records["min_p"],
            records["top_k"],
            numbers,
        ]
    ).astype(np.float32)
    columns[4] = np.minimum(columns[4], np.float32(1 - 2.0**-24))  # below 1 when rounded
    return columns


def _most_alternatives(samples: Samples, scored: NDArray[np.int64]) -> int:
    return max(samples.sequences[number].request.params.logprobs or 0 for number in scored)


def _penalties(samples: Samples, penalised: NDArray[np.int64]) -> NDArray[np.float32]:
    params = [samples.sequences[number].request.params for number in penalised]
    found = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
    return np.ascontiguousarray(np.array(found, np.float32).reshape(-1, 3).T)


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
