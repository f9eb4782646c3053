"""What steps to come will need, made while nobody waits: kernels compiled, decode steps recorded.

On a GPU the first step of its kind takes up to a second more where kernels are to be compiled, and
tens of milliseconds where it is to be recorded. A server without work first compiles what serving
launches, several kernels at once, and then takes such steps ahead, one at a time, so that what comes
in meanwhile waits for one of them at most.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from halyard.compiler.captured import CapturedProgram, room_to_record
from halyard.hal import fallbacks
from halyard.hal.contract import CompilingKernels
from halyard.hal.errors import DeviceMemoryError
from halyard.hal.types import BlockMove
from halyard.runtime.executor import Executor
from halyard.runtime.plan import PlanRow, StepPlan
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.sequence import Sequence, SequenceStatus

__all__ = ["Rehearsal"]

logger = logging.getLogger("halyard.rehearsal")

_PROMPT = 40  # tokens of a short prompt
_MANY_PROMPTS = 128  # tokens of each, in as large a step as there are
_PROMPTS = (64, 128, 256, 512)  # of so many tokens, where products of experts have other tiles
_LONG_PROMPTS = 1100  # two of them are more than is recorded, and long enough to be attended apart
# Keys of a lone row, each of which may be split in another way; more than the last are split alike.
_REACHES = (512, 1024, 2048, 4096, 8192, 16384)
_FARTHEST = 1 << 17
_ROWS = (2, 4, 256)  # of decode steps that go to different kernels
_FEW = 16  # rows of one that has its keys split
_BESIDE = 512  # keys of rows that decode beside prompts: more than a prompt's kernel takes along
_TOKENS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)  # of steps with prompts
# Of a large step's time: where its launches take as much, the host is behind once it plans the next one, too.
_LAUNCHING = 0.5


@dataclass(frozen=True, slots=True)
class _Piece:
    """A step of nobody's: tokens of each row, keys of the row that has most."""

    counts: tuple[int, ...]
    keys: int
    random: bool = False
    shared: bool = False  # all rows have so many keys, and all of them in common
    changed: int = 0  # rows whose logits are changed, as by penalties or grammars


class Rehearsal:
    """What is left to be made, most useful first.

    Args:
        max_tokens: of a step.
    """

    def __init__(self, executor: Executor, max_tokens: int) -> None:
        self._executor = executor
        self._max_tokens = max_tokens
        self._prompts = getattr(executor.kernels, "takes_empty_rows", False)
        self._launching = 0.0
        self._tasks = self._wanted()

    def one(self) -> bool:
        """Make one thing ahead. False: none is wanted, for now."""
        if not room_to_record(self._executor.device):
            return False
        try:
            task = next(self._tasks, None)
            if task is None:
                return False
            task()
        except DeviceMemoryError as error:
            logger.info("steps are recorded when they come: %s", error)
        except Exception as error:  # noqa: BLE001 - nobody asked for it; a step that needs it will tell
            fallbacks.note("rehearsal", f"steps are prepared when they come: {error}")
        else:
            return True
        self._tasks = iter(())
        return False

    def _wanted(self) -> Iterator[Callable[[], None] | None]:
        program = self._executor.program
        if not isinstance(program, CapturedProgram):
            return  # nothing is compiled or recorded when it first runs
        if isinstance(self._executor.kernels, CompilingKernels):
            yield self._compile
        most = program.max_keys
        if self._prompts:
            yield self._run(_Piece((min(_PROMPT, most),), min(_PROMPT, most)))
        yield self._run(_Piece((1,), 1))
        if self._prompts:
            yield self._run(_Piece((self._long(),) * 2, self._long()), recorded=False)
        yield self._run(_Piece((1,), 1, random=True))
        first = program.first_decode_shapes()
        for rows, keys in first:
            if program.fitting_shape(rows, keys) is None:
                return  # the device records nothing
            yield self._run(_Piece((1,) * rows, keys))
        if self._prompts:
            for tokens, rows, keys in program.mixed_shapes():
                if tokens <= self._max_tokens:
                    program.record_next(tokens, rows, keys)
                    yield self._run(_filling(tokens, rows, keys))
            for tokens, rows, keys in program.large_mixed_shapes():
                if tokens > self._max_tokens:
                    break
                yield self._time(self._even(tokens))
                if self._launching < _LAUNCHING:
                    break  # still larger ones are longer on the device, and not to launch
                program.record_next(tokens, rows, keys)
                yield self._run(_filling(tokens, rows, keys))
        for rows, keys in program.decode_shapes():
            if (rows, keys) not in first:
                yield self._run(_Piece((1,) * rows, keys))
        if self._prompts:  # the library's kernels are loaded when they are first launched
            for tokens in (*(n for n in _TOKENS if n < self._max_tokens), self._max_tokens):
                yield self._run(self._even(tokens), recorded=False)
        while True:
            shape = program.due()
            yield None if shape is None else self._run(_filling(*shape))

    def _compile(self) -> None:
        kernels = cast(CompilingKernels, self._executor.kernels)
        with kernels.compiling():
            for piece in self._varieties():
                self._executor.rehearse(self._plan(piece), recorded=False)
            self._executor.move(copies=[BlockMove(0, 0)])  # what swaps blocks, too

    def _varieties(self) -> Iterator[_Piece]:
        """Steps that have between them what serving launches."""
        program = self._executor.program
        assert isinstance(program, CapturedProgram)
        most, rows = program.max_keys, program.max_rows
        if self._prompts:
            long, each = self._long(), min(_MANY_PROMPTS, most)
            yield _Piece((min(_PROMPT, most),), min(_PROMPT, most))
            for tokens in _PROMPTS:
                if tokens <= min(most, self._max_tokens):
                    yield _Piece((tokens,), tokens)
            yield _Piece((long,) * 2, long)
            yield _Piece((each,) * max(1, min(rows, self._max_tokens // each)), each)
            # Prompts, short and long, beside a few rows that decode and beside many.
            for prompt in (min(_PROMPT, most), long):
                for number in sorted({min(_ROWS[0], rows), min(_ROWS[-1], rows)}):
                    if number > 1 and number - 1 + prompt <= self._max_tokens:
                        yield _Piece(
                            (1,) * (number - 1) + (prompt,), min(max(_BESIDE, prompt), most)
                        )
        farthest = min(most, _FARTHEST)
        for keys in sorted({farthest, *(reach for reach in _REACHES if reach < most)}):
            yield _Piece((1,), keys, random=keys in (farthest, _REACHES[0]))
        for number in sorted({min(number, rows) for number in _ROWS}):
            yield _Piece((1,) * number, min(_REACHES[0], most))
        for number in sorted({min(number, rows) for number in (1, _ROWS[0], _FEW, _ROWS[-1])}):
            for random in (False, True):
                for changed in sorted({1, number}):
                    keys = min(_REACHES[0], most)
                    yield _Piece((1,) * number, keys, random, changed=changed)
        # What rows share: many go on from that, the keys of a few are split beside it.
        many, few = min(_ROWS[-1], rows), min(_FEW, rows)
        yield _Piece((1,) * many, min(_REACHES[1], most), random=True, shared=True)
        for keys in sorted({min(_REACHES[2], most), farthest}):
            yield _Piece((1,) * few, keys, shared=True)

    def _even(self, tokens: int) -> _Piece:
        """So many tokens in prompts of about equal length."""
        program = self._executor.program
        assert isinstance(program, CapturedProgram)
        rows = max(2, -(-tokens // min(_MANY_PROMPTS, program.max_keys)))
        counts = _shares(tokens, min(rows, program.max_rows))
        counts = tuple(min(count, program.max_keys) for count in counts)
        return _Piece(counts, max(counts))

    def _long(self) -> int:
        assert isinstance(self._executor.program, CapturedProgram)
        return max(1, min(_LONG_PROMPTS, self._executor.program.max_keys, self._max_tokens // 2))

    def _run(self, piece: _Piece, recorded: bool = True) -> Callable[[], None]:
        def task() -> None:
            self._executor.rehearse(self._plan(piece), recorded)

        return task

    def _time(self, piece: _Piece) -> Callable[[], None]:
        """What part of such a step launches are: the second time, when all that it runs is loaded."""

        def task() -> None:
            for _ in range(2):
                self._launching = self._executor.rehearse(self._plan(piece), recorded=False)

        return task

    def _plan(self, piece: _Piece) -> StepPlan:
        blocks, size = self._executor.pool.num_blocks, self._executor.pool.layout.spec.block_size
        temperature = 1.0 if piece.random else 0.0
        params = SamplingParams(temperature=temperature)
        changed = SamplingParams(temperature=temperature, logit_bias={0: 1.0})
        rows, longest = [], (0,) * piece.keys
        for number, count in enumerate(piece.counts):
            prompt = longest if number == 0 or piece.shared else (0,) * count
            end = len(prompt)
            own = changed if number < piece.changed else params
            request = Request(f"rehearsal-{number}", prompt, own, max_tokens=1)
            sequence = Sequence.first_of(request, -1)
            sequence.status = SequenceStatus.RUNNING
            # Read, never written; different ones, so that the rows have none in common.
            block = 0 if piece.shared else number % blocks
            sequence.block_ids = array("i", [block] * -(-end // size))
            rows.append(PlanRow(sequence, end - count, count, 1))
        tokens = sum(piece.counts)
        return StepPlan(0, tuple(rows), tokens, len(rows), tokens if max(piece.counts) > 1 else 0)


def _filling(tokens: int, rows: int, keys: int) -> _Piece:
    """A step with prompts of that shape, or as near to it as rows of so many keys come."""
    return _Piece(tuple(min(count, keys) for count in _shares(tokens, rows)), keys)


def _shares(tokens: int, rows: int) -> tuple[int, ...]:
    """So many tokens in so many rows, or one row less: a step with prompts has more tokens than rows."""
    if tokens == rows > 1:
        rows -= 1
    each, more = divmod(tokens, rows)
    return (*(each + 1 for _ in range(more)), *(each for _ in range(rows - more)))
