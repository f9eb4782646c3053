"""Anthropic's requests become chat requests."""

import json
from typing import Any

from halyard.api.prompt_size import MAX_STOPS, check_count
from halyard.api.schemas.chat import ChatCompletionRequest, InputMessage
from halyard.api.schemas.messages import CountTokensRequest, MessageRequest
from halyard.hal.errors import RequestError

__all__ = ["as_chat"]

_REFUSED = ("container", "mcp_servers", "context_management")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_chat(request: CountTokensRequest) -> ChatCompletionRequest:
    """The same request in the shape that is served.

    Raises:
        RequestError: something in it is malformed or not served; it is named.
    """
    for name in _REFUSED:
        if getattr(request, name, None):
            raise RequestError(f"{name} is not supported: leave it out", name)
    messages = []
    if request.system:
        messages.append(InputMessage("system", _text(request.system, "system")))
    for number, turn in enumerate(request.messages):
        where = f"messages[{number}]"
        if turn.role not in ("user", "assistant", "system"):
            raise RequestError(
                f"role must be user or assistant, got {turn.role!r}", f"{where}.role"
            )
        messages += _turn(turn.role, turn.content, where)
    choice = request.tool_choice or {}
    chat = ChatCompletionRequest(
        messages=messages,
        tools=[_tool(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or [])],
        tool_choice=_choice(choice) if choice else None,
        parallel_tool_calls=False if choice.get("disable_parallel_tool_use") else None,
    )
    if request.thinking is not None:
        kind = request.thinking.get("type")
        if kind not in ("enabled", "disabled", "adaptive"):
            raise RequestError("thinking.type must be enabled, disabled or adaptive", "thinking")
        if kind != "adaptive":
            chat.chat_template_kwargs = {"enable_thinking": kind == "enabled"}
    if messages and messages[-1].role == "assistant":  # the answer goes on from there
        chat.continue_final_message, chat.add_generation_prompt = True, False
    if isinstance(request, MessageRequest):
        chat.max_completion_tokens = request.max_tokens
        stops = request.stop_sequences or []
        check_count(len(stops), MAX_STOPS, "stop sequences", "stop_sequences")
        if not all(stops):
            raise RequestError("stop_sequences must be without empty strings", "stop_sequences")
        chat.stop = request.stop_sequences
        chat.temperature = request.temperature
        chat.top_k, chat.top_p = request.top_k, request.top_p
        if request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {request.max_tokens}",
                               "max_tokens")  # fmt: skip
    return chat


def _turn(role: str, content: str | list[dict[str, Any]], where: str) -> list[InputMessage]:
    if isinstance(content, str):
        return [InputMessage(role, content)]
    results: list[InputMessage] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(content):
        place = f"{where}.content[{number}]"
        match block.get("type"):
            case "text":
                texts.append(_string(block, "text", place))
            case "thinking":
                thoughts.append(_string(block, "thinking", place))
            case "redacted_thinking":
                pass
            case "tool_use" if role == "assistant":
                arguments = json.dumps(block.get("input") or {})
                function = {"name": _string(block, "name", place), "arguments": arguments}
                call_id = _string(block, "id", place)
                calls.append({"id": call_id, "type": "function", "function": function})
            case "tool_result" if role == "user":
                told = _text(block.get("content") or "", f"{place}.content")
                call_id = _string(block, "tool_use_id", place)
                results.append(InputMessage("tool", told, tool_call_id=call_id))
            case kind:
                raise RequestError(
                    f"content of type {kind!r} is not supported in a turn of role {role}", place
                )
    if role == "assistant":
        return [
            InputMessage(
                role,
                "\n".join(texts) if texts else None,
                reasoning_content="\n".join(thoughts) or None,
                tool_calls=calls or None,
            )
        ]
    if texts or not results:
        results.append(InputMessage(role, "\n".join(texts)))
    return results


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"a tool of type {tool['type']!r} is not supported: it runs on Anthropic's servers",
            f"{where}.type",
        )
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(choice: dict[str, Any]) -> str | dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise RequestError(f"tool_choice.type must be auto, any, tool or none, got {kind!r}",
                           "tool_choice")  # fmt: skip
    return _CHOICES[kind]


def _text(value: Any, where: str) -> str:
    """Text, or blocks of it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError("content must be text or a list of blocks", where)
    texts = []
    for number, block in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(block, dict) or block.get("type") != "text":
            raise RequestError("only text is supported here", place)
        texts.append(_string(block, "text", place))
    return "\n".join(texts)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string", f"{where}.{name}")
    return value
