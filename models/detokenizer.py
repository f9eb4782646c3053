"""Token ids become text one by one, never half a character, at a constant price a token. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Detokenizer"]

_REPLACEMENT = "\ufffd"
_HELD = 3  # characters: some decoders show each byte of an unfinished character as one U+FFFD
_MAX_PENDING = 32  # ids decoded again and again before they are cut off by force


class Detokenizer:
    """Decodes a growing list of ids by decoding a short window of them.

    The window is context (ids whose text was released, for the spacing that they decide) and
    pending ids, which may end within a character:

        ids      [ context ........ | pending ........ ]
        text     released             released | held: at most three U+FFFD at the end
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_tail: Sequence[int] = ()) -> None:
        """`decode` turns ids into text; `prompt_tail` are ids before the first, for context."""
        self._decode = decode
        self._ids: list[int] = list(prompt_tail)
        self._start = len(self._ids)  # where pending ids begin
        self._context = decode(self._ids) if self._ids else ""
        self._sent = 0  # characters of the pending ids' text that were released

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids; returns the text that is final. May be empty."""
        released = ""
        for token in token_ids:
            self._ids.append(token)
            released += self._advance(final=False)
        return released

    def flush(self) -> str:
        """No more ids come: what is left is text, broken bytes as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        now = self._pending_text()
        held = 0
        while not final and held < min(_HELD, len(now)) and now[-1 - held] == _REPLACEMENT:
            held += 1
        end = max(len(now) - held, self._sent)
        text = now[self._sent : end]
        self._sent = end
        if now and not held:
            self._commit(len(self._ids))
        elif len(self._ids) - self._start >= _MAX_PENDING:
            self._shorten(now)
        return text

    def _pending_text(self) -> str:
        now = self._decode(self._ids)
        if now.startswith(self._context):
            return now[len(self._context) :]
        # A byte that fits nowhere can spoil how its neighbours decode; what was said is said.
        return self._decode(self._ids[self._start :])

    def _commit(self, end: int) -> None:
        """Text of ids before `end` is all released: they are context now."""
        del self._ids[: self._start]
        self._start = end - self._start
        self._context = self._decode(self._ids[: self._start])
        self._sent = 0

    def _shorten(self, now: str) -> None:
        """Broken bytes without end, or ids without text: forget all but what may still matter."""
        if not now:
            del self._ids[self._start :]
            return
        pending = self._ids[self._start :]
        for last in range(1, 2 * _HELD + 1):  # ids that may be an unfinished character
            tail = self._decode(pending[-last:])
            if now == self._decode(pending[:-last]) + tail:
                sent = self._sent - (len(now) - len(tail))
                if sent >= 0:
                    self._commit(len(self._ids) - last)
                    self._sent = sent
                    return
