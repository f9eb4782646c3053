"""Token ids become text one by one, never half a character, at a constant price a token. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Detokenizer"]

_REPLACEMENT = "\ufffd"
_PATIENCE = 8  # tokens: a character has at most four bytes; longer runs of U+FFFD are real


class Detokenizer:
    """Decodes a growing list of ids by decoding a short window of them.

    The text of ids [prefix, read) was released; decoding [prefix, now) again and cutting off that
    length gives the new text, with the spacing that context decides.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_tail: Sequence[int] = ()) -> None:
        """`decode` turns ids into text; `prompt_tail` are ids before the first, for context."""
        self._decode = decode
        self._ids: list[int] = list(prompt_tail)
        self._prefix = 0
        self._read = len(self._ids)

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
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        pending = len(self._ids) - self._read
        if now.endswith(_REPLACEMENT) and not final and pending < _PATIENCE:
            return ""
        if len(now) <= len(before) and not final:
            return ""
        text = now[len(before) :]
        if text or final:
            # Keep one released piece as context, forget what is older.
            self._prefix = self._read
            self._read = len(self._ids)
            if self._read - self._prefix > 4 * _PATIENCE or self._prefix > 256:
                del self._ids[: self._prefix]
                self._read -= self._prefix
                self._prefix = 0
        return text
