"""How a model writes tool calls and thoughts, read off its chat template."""

import json
import secrets
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from halyard.models.tokenizer import Tokenizer
from halyard.runtime.request import Constraint

__all__ = ["Dialect", "ToolStyle", "detect"]

ToolStyle = Literal["hermes", "mistral", "mistral-args", "llama"]

_MOST_CALLS = 16  # of an answer that has to call
_NINE = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Dialect:
    """One model's habits."""

    tools: ToolStyle | None = None  # None: its template knows no tools, or an unknown style
    thinks: bool = False  # <think>...</think> before the answer
    special: tuple[tuple[str, int], ...] = ()  # markers that are tokens of no text, with their id

    @property
    def hides_markers(self) -> bool:
        """Whether tool calls can't be seen in text without special tokens."""
        return bool(self.special)

    def new_call_id(self) -> str:
        if self.tools in ("mistral", "mistral-args"):  # their templates insist on nine letters
            return "".join(secrets.choice(_NINE) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def calls(
        self, functions: Sequence[dict[str, Any]], most: int | None, thinking: bool | None
    ) -> Constraint:
        """An answer that calls at least one of these functions.

        Args:
            most: calls at most; None: the usual bound.
            thinking: True: the prompt has opened a thought; None: it can't think.
        """
        bodies = " | ".join(f"body_{number}" for number in range(len(functions)))
        rules = [f"call: {self._call(bodies)}"]
        for number, function in enumerate(functions):
            schema = dict(function.get("parameters") or {"type": "object", "properties": {}})
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
            head, tail = self._body(function["name"])
            rules.append(f"body_{number}: {_quoted(head)} args_{number}{tail}")
            rules.append(f"args_{number}: %json {json.dumps(_compact(schema))}")
        between = {"hermes": '"\\n"', "llama": '"; "', "mistral": '", "'}.get(self.tools or "", "")
        count = _MOST_CALLS if most is None else most
        calls = f"call ({between} call){{0,{count - 1}}}" if count > 1 else "call"
        if self.tools == "mistral":
            calls = f'{self._marker("[TOOL_CALLS]")} "[" {calls} "]"'
        return Constraint("lark", _with_thought(calls, rules, thinking), "tools")

    def after_thought(self, constraint: Constraint, thinking: bool) -> Constraint:
        """The same constraint for what comes after a thought."""
        match constraint.kind:
            case "json_schema":
                schema = _compact(json.loads(constraint.text))
                rules = [f"answer: %json {json.dumps(schema)}"]
            case "regex":
                rules = [f"answer: /{_slashes(constraint.text)}/"]
            case "choice":
                options = map(_quoted, json.loads(constraint.text))
                rules = [f"answer: {' | '.join(options)}"]
            case _:
                return constraint
        return Constraint("lark", _with_thought("answer", rules, thinking), constraint.param)

    def _call(self, bodies: str) -> str:
        match self.tools:
            case "hermes":
                opens, closes = self._marker("<tool_call>"), self._marker("</tool_call>")
                return f'{opens} "\\n" ({bodies}) "\\n" {closes}'
            case "mistral-args":
                return f"{self._marker('[TOOL_CALLS]')} ({bodies})"
        return f"({bodies})"

    def _body(self, name: str) -> tuple[str, str]:
        """What stands before and after a call's arguments."""
        told = json.dumps(name)
        match self.tools:
            case "llama":
                return f'{{"name": {told}, "parameters": ', ' "}"'
            case "mistral-args":
                return f"{name}[ARGS]", ""
        return f'{{"name": {told}, "arguments": ', ' "}"'

    def _marker(self, text: str) -> str:
        for name, token_id in self.special:
            if name == text:
                return f"<[{token_id}]>"
        return _quoted(text)


@lru_cache(maxsize=4)
def detect(tokenizer: Tokenizer | None) -> Dialect:
    """The dialect of a model's template."""
    template = getattr(tokenizer, "chat_template", "") or ""
    if tokenizer is None or not template:
        return Dialect()
    style: ToolStyle | None = None
    markers: Iterable[str] = ()
    if "[TOOL_CALLS]" in template:
        style = "mistral-args" if "[ARGS]" in template else "mistral"
        markers = ("[TOOL_CALLS]", "[ARGS]")
    elif "<tool_call>" in template and "<function=" not in template and "tools" in template:
        style, markers = "hermes", ("<tool_call>", "</tool_call>")
    elif "tools" in template and '"parameters"' in template and "<|start_header_id|>" in template:
        style, markers = "llama", ("<|python_tag|>",)
    ids = {tokenizer.token_text(token): token for token in tokenizer.special_ids}
    special = tuple((marker, ids[marker]) for marker in markers if marker in ids)
    return Dialect(style, "</think>" in template, special)


def _with_thought(answer: str, rules: list[str], thinking: bool | None) -> str:
    """A Lark grammar of an answer after a thought: begun in the prompt, possible, or none."""
    start = f"start: {answer}"
    if thinking is not None:
        # Lazy: the thought ends at its first closing tag.
        rules = [*rules, "thought[lazy]: /(.|\\n)*<\\/think>/", "pause: /\\n{0,2}/"]
        begins = "" if thinking else "<think>"
        thought = f"{_quoted(begins)} thought pause" if begins else "thought pause"
        start = f"start: {thought} {answer}" if thinking else f"start: ({thought})? {answer}"
    return "\n".join([start, *rules])


def _compact(schema: dict[str, Any]) -> dict[str, Any]:
    return {"x-guidance": {"whitespace_pattern": r"[ ]|\n[ ]{0,24}"}, **schema}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _slashes(pattern: str) -> str:
    return pattern.replace("\\/", "/").replace("/", "\\/")
