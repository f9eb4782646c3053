"""One growing answer, split into thought, content and tool calls: the same for whole and streamed."""

from dataclasses import dataclass, field

from halyard.api.dialect import Dialect
from halyard.api.reasoning import ThoughtSplitter
from halyard.api.tool_reader import CallPiece, ToolReader

__all__ = ["AnswerReader", "Piece", "ReadingRules"]


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """How a request's answers are to be read."""

    dialect: Dialect = field(default_factory=Dialect)
    thinking: bool | None = None  # True: the prompt has opened a thought; None: no thoughts here
    functions: frozenset[str] | None = None  # names that may be called; None: no tools
    shows_thoughts: bool = True
    most_calls: int | None = None  # further ones are left out; None: no limit


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain."""

    thought: str = ""
    content: str = ""
    calls: tuple[CallPiece, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.thought or self.content or self.calls)


class AnswerReader:
    """Thoughts first, then tools."""

    def __init__(self, rules: ReadingRules) -> None:
        self._thoughts = None
        if rules.thinking is not None:
            self._thoughts = ThoughtSplitter(rules.thinking)
        self._most_calls = rules.most_calls
        self._shows_thoughts = rules.shows_thoughts
        self._tools = None
        if rules.functions is not None:
            self._tools = ToolReader(rules.dialect, rules.functions)

    @property
    def has_calls(self) -> bool:
        return self._tools is not None and self._tools.has_calls

    @property
    def takes_all(self) -> bool:
        """Whether all text is content, at once."""
        return self._thoughts is None and self._tools is None

    def push(self, text: str, final: bool) -> Piece:
        thought, content = "", text
        if self._thoughts is not None:
            thought, content = self._thoughts.push(text, final)
            thought = thought if self._shows_thoughts else ""
        if self._tools is None:
            return Piece(thought, content)
        content, calls = self._tools.push(content, final)
        if self._most_calls is not None:
            calls = [call for call in calls if call.index < self._most_calls]
        return Piece(thought, content, tuple(calls))
