"""Splits a growing answer into thought and content at <think> ... </think>."""

__all__ = ["ThoughtSplitter"]

_OPEN, _CLOSE = "<think>", "</think>"


class ThoughtSplitter:
    """Feed it text; it returns what is certain of (thought, content), tags and their line breaks gone.

    Args:
        started: the prompt has opened the thought already.
    """

    def __init__(self, started: bool) -> None:
        self._state = "thought" if started else "undecided"
        self._held = ""
        self._fresh = True  # nothing of the current part was released yet

    def push(self, text: str, final: bool = False) -> tuple[str, str]:
        thought = content = ""
        self._held += text
        if self._state == "undecided":
            self._decide(final)
        if self._state == "thought":
            thought = self._think(final)
        if self._state == "content":
            content, self._held = self._trimmed(self._held), ""
        return thought, content

    def _decide(self, final: bool) -> None:
        """Does the answer begin with a thought?"""
        begun = self._held.lstrip()
        if begun.startswith(_OPEN):
            self._held = begun[len(_OPEN) :]
            self._state = "thought"
        elif final or not _OPEN.startswith(begun):
            self._state, self._fresh = "content", False

    def _think(self, final: bool) -> str:
        before, found, after = self._held.partition(_CLOSE)
        if found:
            self._held, self._state = after, "content"
            thought = self._trimmed(before.rstrip("\n"))
            self._fresh = True
            return thought
        keep = 0 if final else _undecided_end(self._held)
        cut = len(self._held) - keep
        thought, self._held = self._trimmed(self._held[:cut]), self._held[cut:]
        return thought

    def _trimmed(self, text: str) -> str:
        """Without the line breaks that separate it from a tag."""
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


def _undecided_end(text: str) -> int:
    """Length of the end of `text` that may be line breaks and a part of the closing tag."""
    keep = next(
        (size for size in range(min(len(_CLOSE) - 1, len(text)), 0, -1)
         if _CLOSE.startswith(text[-size:])), 0
    )  # fmt: skip
    head = text[: len(text) - keep]
    return keep + len(head) - len(head.rstrip("\n"))
