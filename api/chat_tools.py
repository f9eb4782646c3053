"""The tools of a chat request: checked, shown to the template, enforced where the user says so."""

import json
from dataclasses import dataclass
from typing import Any

from halyard.api.dialect import Dialect
from halyard.api.schemas.chat import ChatCompletionRequest
from halyard.hal.errors import RequestError
from halyard.runtime.request import Constraint

__all__ = ["ChatTools", "chat_tools", "plain_calls"]

_CHOICES = "auto, none, required or a function by name"


@dataclass(frozen=True, slots=True)
class ChatTools:
    """Functions that the answer may or must call."""

    shown: list[dict[str, Any]]  # what the template is given
    functions: list[dict[str, Any]]  # those that may be called
    must_call: bool
    most_calls: int | None  # None: no limit was given

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function["name"] for function in self.functions)

    def constraint(self, dialect: Dialect, thinking: bool | None) -> Constraint | None:
        """Holds the answer to calls, if it must call."""
        if not self.must_call:
            return None
        return dialect.calls(self.functions, self.most_calls, thinking)


def chat_tools(request: ChatCompletionRequest, dialect: Dialect) -> ChatTools | None:
    """The request's tools; None if there are none or they must not be called.

    Raises:
        RequestError: malformed, or the model's template knows no tools.
    """
    tools, choice = request.tools or [], request.tool_choice
    if choice is None:
        choice = "auto"
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        raise RequestError(f"tool_choice must be {_CHOICES}, got {choice!r}", "tool_choice")
    if not tools:
        if choice not in ("auto", "none"):
            raise RequestError("tool_choice needs tools: give some", "tool_choice")
        return None
    functions = [_function(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    if choice == "none":
        return None
    if dialect.tools is None:
        raise RequestError(
            "tools are not supported: this model's chat template writes no calls that are known "
            'here; leave them out or set tool_choice to "none"',
            "tools",
        )
    callable_ones = functions
    if isinstance(choice, dict):
        name = _chosen_name(choice)
        callable_ones = [function for function in functions if function["name"] == name]
        if not callable_ones:
            raise RequestError(f"tool_choice names {name!r}, which is not in tools", "tool_choice")
    single = isinstance(choice, dict) or request.parallel_tool_calls is False
    return ChatTools(
        [{"type": "function", "function": function} for function in functions],
        callable_ones,
        choice != "auto",
        1 if single else None,
    )


def plain_calls(calls: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """An assistant's earlier calls as templates want them: arguments as a value, not as text."""
    plain = []
    for number, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError("a tool call needs function.name", f"{where}[{number}]")
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                arguments = {"arguments": arguments}  # what a model once wrote in error
        plain.append(call | {"type": "function", "function": function | {"arguments": arguments}})
    return plain


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise RequestError('a tool must be {"type": "function", "function": {...}}', where)
    function: dict[str, Any] = tool["function"]
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise RequestError("a function needs a name", f"{where}.function.name")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError("parameters must be a JSON schema", f"{where}.function.parameters")
    kind = (parameters or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError(
            'parameters must be a schema of type "object"', f"{where}.function.parameters"
        )
    return function


def _chosen_name(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise RequestError(f"tool_choice must be {_CHOICES}", "tool_choice")
    return name
