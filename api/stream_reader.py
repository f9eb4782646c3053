"""The reading side of a streamed answer: HTTP chunks become events, at a price that hundreds of streams can pay."""

from __future__ import annotations

__all__ = ["StreamReader"]

_MAX_LINE = 1 << 10  # bytes of a chunk's length and extensions


class StreamReader:
    """Takes what the socket brings, in whatever pieces, and gives the data of whole events.

    Args:
        chunked: the body comes in HTTP chunks; False: as it is, until the connection ends.
    """

    def __init__(self, chunked: bool) -> None:
        self._chunked = chunked
        self._raw = b""  # received, not taken out of its chunk yet
        self._left = 0  # bytes to come of the present chunk, with the line's end behind it
        self._body = b""  # the beginning of an event
        self.ended = False  # the last chunk has come

    @property
    def rest(self) -> bytes:
        """What came behind the last whole event."""
        return self._body

    def feed(self, data: bytes) -> list[bytes]:
        """The data of all events that are whole now, without comments and empty ones.

        Raises:
            ValueError: these are no HTTP chunks.
        """
        self._body += self._unpack(data) if self._chunked else data
        *events, self._body = self._body.split(b"\n\n")
        told = (event.strip().removeprefix(b"data:").strip() for event in events)
        return [one for one in told if one and not one.startswith(b":")]

    def _unpack(self, data: bytes) -> bytes:
        raw, at, pieces = self._raw + data, 0, []
        while not self.ended:
            if self._left:
                piece = raw[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                # The two last bytes of a chunk are its line's end.
                pieces.append(piece[: len(piece) - max(0, 2 - self._left)])
                if self._left:
                    break
            end = raw.find(b"\r\n", at)
            if end < 0:
                if len(raw) - at > _MAX_LINE:
                    raise ValueError("the answer's chunks can't be read")
                break
            size = int(raw[at:end].split(b";")[0], 16)
            at = end + 2
            self.ended = size == 0
            self._left = size + 2
        self._raw = raw[at:]
        return b"".join(pieces)
