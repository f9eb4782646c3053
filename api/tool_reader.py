"""Reads tool calls out of a growing answer: text, names and pieces of arguments as they come."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from halyard.api.dialect import Dialect

__all__ = ["CallPiece", "ToolReader"]

_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class CallPiece:
    """News about one call: its start, with id and name, or more of its arguments."""

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolReader:
    """Feed it text; it returns what is certain: (content, pieces of calls).

    Text that looked like a call and is none comes back as content, if only at the end.
    """

    def __init__(self, dialect: Dialect, names: frozenset[str]) -> None:
        self._style = dialect.tools
        self._names = names
        self._new_id: Callable[[], str] = dialect.new_call_id
        self._opening = {"hermes": "<tool_call>", "llama": "<|python_tag|>"}.get(
            self._style or "", "[TOOL_CALLS]"
        )
        self._held = ""
        self._body: _Body | None = None
        self._calls = 0
        self._content_begun = False  # Llama's calls stand alone: JSON after text is text
        self._inside = False  # between calls, after the first one: white space is no content
        self._content: list[str] = []
        self._pieces: list[CallPiece] = []

    @property
    def has_calls(self) -> bool:
        return self._calls > 0

    def push(self, text: str, final: bool = False) -> tuple[str, list[CallPiece]]:
        self._held += text
        while self._step(final):
            pass
        if final:
            self._finish()
        content, pieces = "".join(self._content), self._pieces
        self._content, self._pieces = [], []
        return content, pieces

    def _step(self, final: bool) -> bool:
        """Make some progress with the held text; False if more is needed."""
        if not self._held:
            return False
        if self._body is not None:
            used = self._body.push(self._held)
            self._held = self._held[used:]
            self._report(self._body)
            if self._body.done:
                if not self._body.started:  # JSON, but no call
                    self._content.append(self._body.raw)
                    self._inside = False
                self._body = None
                return True
            return False
        if self._style == "llama":
            return self._find_bare_call()
        return self._find_marked_call(final)

    def _find_bare_call(self) -> bool:
        rest = self._held.lstrip()
        if self._inside:
            rest = rest.lstrip("; \n")
        if rest.startswith(self._opening):
            self._held = rest[len(self._opening) :]
            return True
        if not rest or self._opening.startswith(rest):
            return False
        if rest.startswith("{") and not self._content_begun:
            self._held = rest
            self._open(_Body(None))
            return True
        self._content_begun = True
        self._content.append(self._held)
        self._held = ""
        return False

    def _find_marked_call(self, final: bool) -> bool:
        if self._inside:
            return self._find_next_body(final)
        before, found, after = self._held.partition(self._opening)
        if found:
            self._say(before.rstrip() if not self._calls else before.strip())
            self._held, self._inside = after, True
            return True
        keep = _partial(self._held, self._opening)
        cut = len(self._held) - keep
        cut = len(self._held[:cut].rstrip()) if not final else cut
        self._say(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _find_next_body(self, final: bool) -> bool:
        """After the marker: the JSON of a call, or a name and [ARGS], or the end of the calls."""
        rest = self._held.lstrip("[,] \n") if self._style == "mistral" else self._held.lstrip()
        if self._style == "hermes" and rest.startswith("</tool_call>"):
            self._held, self._inside = rest[len("</tool_call>") :], False
            return True
        if rest.startswith("{"):
            self._held = rest
            self._open(_Body(None))
            return True
        if rest.startswith(self._opening):
            self._held = rest[len(self._opening) :]
            return True
        if self._style == "mistral-args":
            name, found, arguments = rest.partition("{")
            if found:
                self._held = found + arguments
                self._open(_Body(name.removesuffix("[ARGS]").strip()))
                return True
        if final:
            self._held, self._inside = rest, False
        return False

    def _open(self, body: "_Body") -> None:
        self._body = body
        self._inside = True

    def _report(self, body: "_Body") -> None:
        if not body.started and body.name is not None:
            if self._style == "llama" and body.name not in self._names:
                body.name = None  # some JSON that happens to have a name
                body.silent = True
                return
            body.started = True
            self._pieces.append(CallPiece(self._calls, self._new_id(), body.name))
            self._calls += 1
        if body.started and (piece := body.take()):
            self._pieces.append(CallPiece(self._calls - 1, arguments=piece))
        if body.done and body.started and not body.told_any:
            self._pieces.append(CallPiece(self._calls - 1, arguments="{}"))

    def _finish(self) -> None:
        """Nothing more comes: what is held is content, unless a call was cut off."""
        if self._body is not None and not self._body.started:
            opening = "" if self._style == "llama" else self._opening
            self._content.append(opening + self._body.raw)
        elif self._body is None and not (self._inside and not self._held.strip("]} \n")):
            self._content.append(self._held.rstrip() if self._calls else self._held)
        self._held, self._body = "", None

    def _say(self, text: str) -> None:
        if text.strip() or not self._calls:
            self._content.append(text)


class _Body:
    """One JSON object {"name": ..., "arguments": {...}}, or, with a name given, the arguments."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.done = False
        self.started = False
        self.silent = False  # it turned out to be no call
        self.told_any = False
        self.raw = ""
        self._is_arguments = name is not None
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._token = -1  # where in raw the current top-level string or value begins
        self._key: str | None = None
        self._expects_value = False
        self._arguments = ""  # not yet taken
        self._value_is_arguments = False

    def push(self, text: str) -> int:
        """Read on; returns how many characters were used."""
        for position, char in enumerate(text):
            self.raw += char
            self._read(char)
            if self.done:
                return position + 1
        return len(text)

    def take(self) -> str:
        """New pieces of the arguments."""
        piece, self._arguments = self._arguments, ""
        self.told_any = self.told_any or bool(piece)
        return piece

    def _read(self, char: str) -> None:
        if self._is_arguments:
            self._arguments += char
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                if self._depth == 1 and not self._is_arguments:
                    self._end_string()
            if self._value_is_arguments and self._depth > 1:
                self._arguments += char
            return
        if char in "}]":
            self._depth -= 1
        if self._value_is_arguments and (self._depth > 1 or (char in "}]" and self._depth == 1)):
            self._arguments += char
        if char == '"':
            self._in_string = True
            if self._depth == 1:
                self._token = len(self.raw) - 1
        elif char in "{[":
            self._depth += 1
            if self._depth == 2 and self._expects_value:
                self._value_is_arguments = self._key in _ARGUMENTS
                if self._value_is_arguments:
                    self._arguments += char
        elif char in "}]":
            if self._depth == 0:
                self.done = True
            elif self._depth == 1:
                self._value_is_arguments = self._expects_value = False
        elif char == ":" and self._depth == 1:
            self._expects_value = True
        elif char == "," and self._depth == 1:
            self._expects_value = False

    def _end_string(self) -> None:
        """A string at the top level has ended: a key, the name, or arguments as a string."""
        try:
            value = str(json.loads(self.raw[self._token :], strict=False))
        except ValueError:
            return
        if not self._expects_value:
            self._key = value
        elif self._key == "name" and self.name is None and not self.silent:
            self.name = value
        elif self._key in _ARGUMENTS:
            self._arguments += value


def _partial(text: str, marker: str) -> int:
    """Length of the end of `text` that begins `marker`."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0
