"""Short ways to the end of a form, for answers that must be complete when their tokens run out. No torch.

A way is searched with the grammar's own matcher, greedily: closing marks first, then what is short.
What is found is a way that the grammar takes, if seldom the shortest there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from halyard.runtime.guided import Vocabulary

__all__ = ["Closer", "Lead"]

_FIRST_LOOK = 512  # tokens left when the first way is searched
_JUMP = 32  # tokens that a way grows by with one token drawn, at most, is what is hoped for
_AGAIN = 0.3  # what a token costs more each time: nobody should write the same letter for ever
_MANY = 64  # tokens allowed: inside a text, where its end is wanted and brackets close nothing
_CLOSING, _OPENING = b'}]"', (b"{", b"[", b",")


class Closer:
    """Searches ways for one vocabulary.

    Args:
        vocabulary: is called when the first way is searched.
        eos_token_ids: below vocab_size; the first of them ends a way.
    """

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._costs: NDArray[np.float32] | None = None  # [vocab_size]
        self._elsewhere = np.ones(vocab_size, np.float32)  # inside a text: what doesn't end it

    def way(self, matcher: Any, most: int) -> list[int] | None:
        """At most that many tokens, an end last, that complete what the matcher has read; or None."""
        matcher = matcher.deep_copy()
        costs = self._first_costs().copy()
        packed = np.zeros(-(-self._vocab_size // 32), np.int32)
        way: list[int] = []
        while len(way) < most:
            if not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(packed.ctypes.data, packed.nbytes)
            if matcher.is_error():
                return None
            bits = np.unpackbits(packed.view(np.uint8), bitorder="little")
            if matcher.is_stopped() or bits[self._eos].any() or not bits.any():
                return [*way, self._eos[0]]
            allowed = np.flatnonzero(bits[: self._vocab_size])
            own = costs[allowed]
            if len(allowed) > _MANY:
                own = own + self._elsewhere[allowed]
            token = int(allowed[own.argmin()])
            costs[token] += _AGAIN if costs[token] > 0.5 else _AGAIN / 10
            if not matcher.consume_token(token):
                return None
            way.append(token)
        return None

    def _first_costs(self) -> NDArray[np.float32]:
        if self._costs is None:
            vocabulary = self._vocabulary()
            self._costs = np.full(self._vocab_size, 9, np.float32)
            special = vocabulary.special_ids
            for token in range(min(self._vocab_size, vocabulary.vocab_size)):
                if token not in special:
                    spelled = vocabulary.token_bytes(token)
                    self._costs[token] = _cost(spelled)
                    self._elsewhere[token] = not spelled.startswith(b'"')
        return self._costs


def _cost(text: bytes) -> float:
    if not text.strip():
        return 8.0
    if all(byte in _CLOSING for byte in text):
        return 0.1 - 0.01 * len(text)
    if text in (b"null", b"true", b"false") or text.isdigit():
        return 1.0
    if text.startswith(_OPENING):
        return 3.0
    return 2.0 - 0.001 * len(text)


class Lead:
    """Leads one answer to the end of its form before its tokens run out."""

    __slots__ = ("jump", "look", "way")

    def __init__(self) -> None:
        self.way: list[int] = []  # what is drawn from now on; empty: what the answer likes
        self.jump = 0  # what one token drawn may add to the way; 0: no way was found so far
        self.look = _FIRST_LOOK  # tokens left when a way is searched next

    def follow(self, matcher: Any, room: int, closer: Closer) -> None:
        """`room` tokens are left: is it time to go?

        A token that is drawn may make the way longer, by a jump at most. So it is searched again
        before as many tokens are drawn as jumps are left.
        """
        if self.way or room > self.look:
            return
        way = closer.way(matcher, room)
        if way is None:
            self.look = room - 1 - room // 8
            return
        self.jump = self.jump or min(_JUMP, room // 2)  # few tokens in all: some of them are free
        jump = max(self.jump, len(way))
        free = room - len(way)
        if free <= jump:
            self.way = way
        else:
            self.look = room - max(1, free // jump - 1)

    def drawn(self, tokens: Sequence[int]) -> None:
        """These were."""
        self.way = self.way[len(tokens) :] if self.way[: len(tokens)] == list(tokens) else []
