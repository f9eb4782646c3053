"""A step that was issued: what it is computing, and how that comes to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from torch import Tensor

from halyard.hal.contract import Fetch
from halyard.hal.errors import DeviceMemoryError
from halyard.hal.memory_errors import is_out_of_memory, one_line
from halyard.runtime.masks import Masks
from halyard.runtime.plan import PlanRow, StepOutput, StepPlan, TokenLogprob
from halyard.runtime.sampler import Draw
from halyard.runtime.scores import Scores

__all__ = ["Drawn", "Here", "PromptScores", "RunningStep"]

T = TypeVar("T")

NOT_FINITE = "what the model computed is not finite: its weights may be damaged"


class Here:
    """A tensor that needs no fetching: work is done when it is issued."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def ready(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._tensor


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of a step, on their way."""

    token_ids: Tensor  # [samples] int64 on the device
    codes: Fetch  # [samples] int64: twice the token, plus one if its logits were bad
    scored: list[int]  # samples that scores are of
    scores: list[Fetch]  # the columns of Scores
    failures: dict[int, str]  # by sample: void, and why
    masks: Masks | None  # of guided rows


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of a prompt's tokens that a step computed."""

    columns: list[Fetch]  # of Scores
    num_top: int  # alternatives of each


class RunningStep:
    """A step that was issued. `wait` brings its results to the host."""

    def __init__(
        self,
        plan: StepPlan,
        prompt_scores: dict[int, PromptScores],
        pooled_rows: Sequence[int],
        pooled: Fetch | None,
    ) -> None:
        self.plan = plan
        self._prompt_scores = prompt_scores  # by plan row
        self._pooled_rows = pooled_rows  # plan rows that pool
        self._pooled = pooled  # [pooled rows, hidden] fp32, sums
        self._drawn: Drawn | None = None  # None: no row reached its end, or it is not drawn yet
        self.undrawn: Callable[[Draw], Drawn] | None = None  # draws, from logits that are coming

    @property
    def token_ids(self) -> Tensor | None:
        """[samples] int64 on the device; None: there are none."""
        if self.undrawn is not None:
            raise AssertionError("tokens are wanted that are not drawn yet")
        return self._drawn.token_ids if self._drawn is not None else None

    def draw(self, how: Draw) -> None:
        """Issue its draws, once."""
        if self.undrawn is not None:
            undrawn, self.undrawn = self.undrawn, None
            self._drawn = undrawn(how)

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        codes = self._drawn.codes if self._drawn is not None else None
        return all(fetch is None or fetch.ready() for fetch in (codes, self._pooled))

    def wait(self) -> StepOutput:
        """Raises DeviceMemoryError if the device finds only now that its memory is too small."""
        try:
            return self._wait()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(one_line(error)) from None

    def _wait(self) -> StepOutput:
        if self.undrawn is not None:
            raise AssertionError("a step is waited for that is not drawn yet")
        rows, drawn = self.plan.rows, self._drawn
        codes = drawn.codes.wait().tolist() if drawn is not None else []
        drawn_ids = [code >> 1 for code in codes]
        if drawn is not None and drawn.masks is not None:
            drawn.masks.follow(drawn_ids)
        tokens = _by_row(rows, drawn_ids)
        nothing = (None,) * len(rows)
        logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] = nothing
        if drawn is not None and drawn.scored:
            logprobs = self._logprobs(drawn, len(codes))
        errors: dict[int, str] = {}
        failures = drawn.failures if drawn is not None else {}
        if failures or any(code & 1 for code in codes):
            numbers = [number for number, row in enumerate(rows) for _ in range(_num_drawn(row))]
            errors = {numbers[sample]: text for sample, text in failures.items()}
            errors |= {numbers[sample]: NOT_FINITE for sample, code in enumerate(codes) if code & 1}
        pooled = {}
        if self._pooled is not None:
            for number, vector in zip(self._pooled_rows, self._pooled.wait().numpy(), strict=True):
                pooled[number] = vector
                if not np.isfinite(vector).all():
                    errors[number] = NOT_FINITE
        prompts = {row: _listed(scores) for row, scores in self._prompt_scores.items()}
        return StepOutput(
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(map(prompts.get, range(len(rows)))) if prompts else nothing,
            errors=tuple(errors.items()),
            pooled=pooled,
        )

    def _logprobs(
        self, drawn: Drawn, num_samples: int
    ) -> tuple[tuple[TokenLogprob, ...] | None, ...]:
        rows = self.plan.rows
        owners = [row.sequence for row in rows for _ in range(_num_drawn(row))]
        tops = [owners[sample].request.params.logprobs or 0 for sample in drawn.scored]
        listed = Scores(*(column.wait() for column in drawn.scores)).listed(tops)
        found: list[TokenLogprob | None] = [None] * num_samples
        for sample, logprob in zip(drawn.scored, listed, strict=True):
            found[sample] = logprob
        return tuple(
            tuple(logprob for logprob in own if logprob is not None) or None
            for own in _by_row(rows, found)
        )


def _listed(scores: PromptScores) -> tuple[TokenLogprob, ...]:
    columns = [column.wait() for column in scores.columns]
    return tuple(Scores(*columns).listed([scores.num_top] * len(columns[0])))


def _by_row(rows: tuple[PlanRow, ...], values: list[T]) -> tuple[tuple[T, ...], ...]:
    """One value a sample -> those of each plan row."""
    if len(values) == len(rows) and all(_num_drawn(row) == 1 for row in rows):
        return tuple(zip(values, strict=True))
    left = iter(values)
    return tuple(tuple(islice(left, _num_drawn(row))) for row in rows)


def _num_drawn(row: PlanRow) -> int:
    return 0 if row.sequence.pools else row.num_samples
