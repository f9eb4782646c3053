"""Vocabularies whose tokens are bytes (byte-level BPE): text is their bytes in UTF-8. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence

__all__ = ["ByteDetokenizer", "BytePieces", "byte_level_alphabet"]


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return table


class BytePieces(dict[int, bytes]):
    """Token id -> its bytes, in a vocabulary whose tokens are bytes; kept once asked for.

    Args:
        name: the vocabulary's word for an id; None: it has none.
        left_out: words that are no text.
    """

    def __init__(self, name: Callable[[int], str | None], left_out: frozenset[str]) -> None:
        super().__init__()
        self._name = name
        self._left_out = left_out
        alphabet = byte_level_alphabet()
        self._letters = frozenset(alphabet)
        self._codes = {ord(char): byte for char, byte in alphabet.items()}

    def __missing__(self, token_id: int) -> bytes:
        word = self._name(token_id)
        if word is None or word in self._left_out:
            piece = b""
        elif self._letters.issuperset(word):
            piece = word.translate(self._codes).encode("latin-1")
        else:  # an added token that is written as it is
            piece = word.encode()
        self[token_id] = piece
        return piece


class ByteDetokenizer:
    """As `Detokenizer`, at a tenth of its price: here no token changes how another one reads.

    The same text as that of the whole decode, however many ids come at once.
    """

    __slots__ = ("_held", "_pieces")

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces
        self._held = b""  # the beginning of a character

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids; returns the text that is final. May be empty."""
        data = self._held + b"".join(map(self._pieces.__getitem__, token_ids))
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def flush(self) -> str:
        """No more ids come: what is left is text, broken bytes as U+FFFD."""
        held, self._held = self._held, b""
        return held.decode(errors="replace")
