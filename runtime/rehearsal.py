"""What steps to come will need, made while nobody waits: kernels compiled, decode steps recorded.

On a GPU the first step of its kind takes up to a second more where kernels are to be compiled, and
tens of milliseconds where it is to be recorded. A server without work takes such steps ahead, one at
a time, so that what comes in meanwhile waits for one of them at most.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from halyard.compiler.captured import CapturedProgram
from halyard.hal import fallbacks
from halyard.hal.errors import DeviceMemoryError
from halyard.runtime.executor import Executor
from halyard.runtime.plan import PlanRow, StepPlan
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.sequence import Sequence, SequenceStatus

__all__ = ["Rehearsal"]

logger = logging.getLogger("halyard.rehearsal")

_PROMPT = 40  # tokens of a short prompt
_LONG_PROMPTS = 1100  # two of them are more than is recorded, and long enough to be attended apart
_SPARE = 0.03  # of the device's memory, and at least:
_SPARE_BYTES = 512 << 20  # recordings ahead of need take none of the last


@dataclass(frozen=True, slots=True)
class _Piece:
    """A step of nobody's: tokens of each row, keys of the row that has most."""

    counts: tuple[int, ...]
    keys: int
    params: SamplingParams


class Rehearsal:
    """The pieces that are left, most useful first."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._pieces = self._wanted()

    def one(self) -> bool:
        """Take one step ahead. False: none is wanted, for now."""
        memory = self._executor.device.memory()
        if memory.free < max(_SPARE_BYTES, _SPARE * memory.total):
            return False
        piece = next(self._pieces, None)
        if piece is None:
            return False
        try:
            self._executor.rehearse(self._plan(piece))
        except DeviceMemoryError as error:
            logger.info("steps are recorded when they come: %s", error)
        except Exception as error:  # noqa: BLE001 - nobody asked for it; a step that needs it will tell
            fallbacks.note("rehearsal", f"steps are prepared when they come: {error}")
        else:
            return True
        self._pieces = iter(())
        return False

    def _wanted(self) -> Iterator[_Piece | None]:
        program = self._executor.program
        if not isinstance(program, CapturedProgram):
            return  # nothing is compiled or recorded when it first runs
        greedy, random = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)
        most = program.max_keys
        prompts = getattr(self._executor.kernels, "takes_empty_rows", False)
        if prompts:
            yield _Piece((min(_PROMPT, most),), min(_PROMPT, most), greedy)
        yield _Piece((1,), 1, greedy)
        if prompts:
            yield _Piece((min(_LONG_PROMPTS, most),) * 2, min(_LONG_PROMPTS, most), greedy)
        yield _Piece((1,), 1, random)
        for rows, keys in program.decode_shapes():
            if program.decode_shape(rows, keys) is None:
                return  # the device records nothing
            yield _Piece((1,) * rows, keys, greedy)
        while True:
            shape = program.seen_once()
            yield None if shape is None else _Piece(_shares(*shape[:2]), shape[2], greedy)

    def _plan(self, piece: _Piece) -> StepPlan:
        blocks, size = self._executor.pool.num_blocks, self._executor.pool.layout.spec.block_size
        rows = []
        for number, count in enumerate(piece.counts):
            end = piece.keys if number == 0 else count
            request = Request(f"rehearsal-{number}", (0,) * end, piece.params, max_tokens=1)
            sequence = Sequence.first_of(request, -1)
            sequence.status = SequenceStatus.RUNNING
            # Read, never written; different ones, so that the rows have none in common.
            sequence.block_ids = array("i", [number % blocks] * -(-end // size))
            rows.append(PlanRow(sequence, end - count, count, 1))
        tokens = sum(piece.counts)
        return StepPlan(0, tuple(rows), tokens, len(rows), tokens if max(piece.counts) > 1 else 0)


def _shares(tokens: int, rows: int) -> tuple[int, ...]:
    """So many tokens in so many rows, or one row less: a step with prompts has more tokens than rows."""
    if tokens == rows:
        rows -= 1
    each, more = divmod(tokens, rows)
    return (*(each + 1 for _ in range(more)), *(each for _ in range(rows - more)))
