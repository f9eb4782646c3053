"""Which tokens a step's guided answers may draw: made beside the host's work. No torch.

As soon as a step's tokens are known they go to a thread (`Masks.follow`), where the library reads
them and makes the masks of what comes after: two calls, which need the interpreter's lock only for
their first moment, which it gets before the host goes on. `MaskMaker.begin` finds the masks when the next
step is drawn, and starts those that are missing: of answers that begin, or went another way.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from halyard.hal.cpuinfo import num_threads
from halyard.runtime.closing import Closer, Lead

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TOO_COMPLEX", "Allocate", "Allowed", "Guidance", "MaskMaker", "MaskRow", "Masks"]

TOO_COMPLEX = "the answer's grammar grew too complex to go on"
Allocate = Callable[[tuple[int, int]], "NDArray[np.int32]"]
_MOST_THREADS = 16
_LENT = 0.001  # seconds, at most


class MaskRow(NamedTuple):
    """A row of a step that is guided."""

    position: int  # among the step's sampled rows
    guidance: Guidance
    answer_index: int
    token_ids: Sequence[int]  # prompt and answer so far
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a step's guided rows may draw."""

    positions: list[int]  # rows, as in MaskRow
    bits: NDArray[np.uint8]  # [len(positions), bytes] a bit a token, lowest first
    failures: dict[int, str]  # by position: the row's grammar broke down, its mask allows all


class _Batch:
    """Masks that are made together."""

    __slots__ = (
        "_begun",
        "_error",
        "_making",
        "drawn",
        "empty",
        "made",
        "packed",
        "states",
        "work",
    )

    def __init__(self, states: list[_State], packed: NDArray[np.int32]) -> None:
        self.states = states  # of its rows
        self.packed = packed  # [rows, words] a bit a token
        self.empty: NDArray[np.bool_] | None = None  # [rows] nothing is allowed
        self.drawn: list[tuple[Any, int]] = []  # matchers and the tokens that they read first
        self.work: list[tuple[Any, int]] = []  # matchers and their rows, those that go on
        self.made = False  # as far as the engine's thread knows
        self._making = threading.Lock()  # held until they are
        self._begun = threading.Lock()  # held until the thread has begun
        self._error: BaseException | None = None
        self._making.acquire()
        self._begun.acquire()

    def make(self, executor: Any) -> None:
        """In the thread."""
        packed = self.packed
        place = (packed.ctypes.data, packed.shape[1] * 4, packed.shape[0])
        self._begun.release()
        try:
            if self.drawn:
                executor.consume_token_par(self.drawn)  # what a grammar refuses breaks its matcher
            executor.unsafe_compute_mask_ptr(self.work, *place)
            self.empty = _empty(packed)
        except Exception as error:  # noqa: BLE001  # whoever waits raises it
            self._error = error
        self.finish()

    def finish(self) -> None:
        self._making.release()

    def lend(self) -> None:
        """Lend the interpreter to the thread until it has begun."""
        if self.work:
            self._begun.acquire(timeout=_LENT)

    def wait(self) -> None:
        """Until they are made. Their matchers are nobody's from then on."""
        if not self.made:
            self._making.acquire()
            self._making.release()
            if self._error is not None:
                raise self._error
            self.made = True
            for state in self.states:
                state.stopped = state.stopped or state.matcher.is_stopped()


@dataclass(slots=True, eq=False)
class _State:
    """How far one answer is in its grammar."""

    matcher: Any
    consumed: int = 0  # tokens of the answer
    stopped: bool = False  # nothing but the end can follow; known when no mask is being made
    batch: _Batch | None = None  # holds the mask of the token after them; None: nobody has begun it
    row: int = 0  # in the batch
    lead: Lead | None = None  # of an answer that must be complete

    def consume(self, tokens: list[int]) -> None:
        """Take these in here and now."""
        self.settle()
        self.batch = None
        self.consumed += len(tokens)
        if self.lead is not None:
            self.lead.drawn(tokens)
        if not self.stopped:
            matcher = self.matcher
            matcher.consume_tokens(tokens)
            self.stopped = matcher.is_stopped()

    def settle(self) -> None:
        """The matcher is in use while a mask is made."""
        batch = self.batch
        if batch is not None and not batch.made:
            batch.wait()

    def close(self, room: int, closer: Closer) -> None:
        """See to it that the answer is complete when no room is left."""
        if self.lead is None:
            self.lead = Lead()
        if room <= self.lead.look:
            self.settle()
            if not self.stopped:
                self.lead.follow(self.matcher, room, closer)


@dataclass(slots=True)
class Guidance:
    """One request's constraint and the state of its answers. Belongs to the engine's thread."""

    maker: MaskMaker
    template: Any  # the matcher at its start; never advanced
    states: dict[int, _State] = field(default_factory=dict)  # by answer
    most: int = 0  # tokens that an answer must be complete with; 0: it may be cut off

    def state(self, row: MaskRow) -> _State:
        """The answer's state, with the tokens that are new since the last call."""
        length = len(row.token_ids) - row.num_prompt_tokens
        state = self.states.get(row.answer_index)
        if state is None or state.consumed > length:
            state = self.states[row.answer_index] = _State(self.template.deep_copy())
        if state.consumed < length:
            state.consume(list(row.token_ids[row.num_prompt_tokens + state.consumed :]))
        return state


class Masks:
    """The masks of one step's guided rows. Belongs to the engine's thread."""

    def __init__(self, maker: MaskMaker, positions: list[int], states: list[_State]) -> None:
        self._maker = maker
        self._positions = positions
        self._states = states

    def result(self) -> Allowed:
        """Wait for them."""
        packed, empty = self._packed()
        positions, failures = self._positions, {}
        if empty.any():  # complete before, or found just now that nothing can follow
            packed[empty] = self._maker.ends
        for number, state in enumerate(self._states):
            if state.stopped:
                if state.matcher.is_error():
                    packed[number] = -1
                    failures[positions[number]] = TOO_COMPLEX
                    continue
                packed[number] = self._maker.ends
            if state.lead is not None and state.lead.way:
                token = state.lead.way[0]
                packed[number] = 0
                packed[number].view(np.uint32)[token // 32] = 1 << token % 32
        return Allowed(positions, packed.view(np.uint8), failures)

    def _packed(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """[rows, words], the batch itself if it holds these rows and no others; [rows] which are empty."""
        states = self._states
        batch = states[0].batch
        if batch is not None and batch.states == states:
            batch.wait()
            packed, empty = batch.packed, batch.empty
        else:
            packed, empty = np.stack([_mask(state) for state in states]), None
        return packed, empty if empty is not None else _empty(packed)

    def follow(self, tokens: Sequence[int]) -> None:
        """The step has drawn these [samples]: the masks of what comes after them begin.

        Returns when their thread has: the host may keep the interpreter's lock from then on.
        """
        self._maker.start(self._states, [tokens[position] for position in self._positions]).lend()


def _empty(packed: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[rows] of [rows, words]: no bit is set."""
    # any() takes ten times as long.
    found: NDArray[np.bool_] = np.bitwise_or.reduce(packed, axis=1) == 0
    return found


def _mask(state: _State) -> NDArray[np.int32]:
    if state.batch is None:
        raise AssertionError("nobody has begun this mask")
    state.batch.wait()
    mask: NDArray[np.int32] = state.batch.packed[state.row]
    return mask


class MaskMaker:
    """Makes the masks of one model's steps.

    Args:
        vocab_size: of the logits.
        eos_token_ids: what a complete answer allows.
        closer: finds the ends of answers that must be complete.
        allocate: makes room for masks, int32 of a shape, whatever is in it; None: anywhere. A device may
            copy from some memory sooner.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        closer: Closer | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        self._closer = closer
        self._allocate: Allocate = allocate or (lambda shape: np.empty(shape, np.int32))
        self._num_words = -(-vocab_size // 32)
        ends = np.zeros(self._num_words, np.uint32)
        for token in eos_token_ids:
            ends[token // 32] |= np.uint32(1 << token % 32)
        self.ends = ends.view(np.int32)  # [words]
        self._batches: SimpleQueue[_Batch | None] | None = None  # of the thread, once there is one

    def begin(self, rows: Sequence[MaskRow]) -> Masks:
        """The masks of a step that is prepared; those that nobody has begun begin."""
        positions, states, closer = [], [], self._closer
        for row in rows:
            guidance, token_ids = row.guidance, row.token_ids
            state = guidance.states.get(row.answer_index)
            if state is None or state.consumed != len(token_ids) - row.num_prompt_tokens:
                state = guidance.state(row)
            if guidance.most and closer is not None:
                state.close(guidance.most - state.consumed, closer)
            positions.append(row.position)
            states.append(state)
        missing = [state for state in states if state.batch is None]
        if missing:
            self.start(missing)
        return Masks(self, positions, states)

    def start(self, states: list[_State], drawn: Sequence[int] | None = None) -> _Batch:
        """Begin the next mask of answers: of those that have none, or that come after a token each."""
        batch = _Batch(states, self._allocate((len(states), self._num_words)))
        if drawn is not None:
            for state, token in zip(states, drawn, strict=True):
                state.settle()
                state.consumed += 1
                if state.lead is not None:
                    state.lead.drawn([token])
                if not state.stopped:
                    batch.drawn.append((state.matcher, token))
        work = batch.work
        for number, state in enumerate(states):
            state.batch, state.row = batch, number
            if state.stopped:
                batch.packed[number] = 0
            else:
                work.append((state.matcher, number))
        if not work:
            batch.finish()
        else:
            self._thread().put(batch)
        return batch

    def _thread(self) -> SimpleQueue[_Batch | None]:
        if self._batches is None:
            batches: SimpleQueue[_Batch | None] = SimpleQueue()
            self._batches = batches
            threads = max(1, min(num_threads() - 1, _MOST_THREADS))
            executor = importlib.import_module("llguidance").LLExecutor(threads)
            threading.Thread(
                target=_work, args=(batches, executor), name="halyard-masks", daemon=True
            ).start()
            weakref.finalize(self, batches.put, None)
        return self._batches


def _work(batches: SimpleQueue[_Batch | None], executor: Any) -> None:
    while (batch := batches.get()) is not None:
        batch.make(executor)
        del batch  # and the matchers of requests that are over
