"""Requests of the responses API become chat requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halyard.api.parameters import refuse
from halyard.api.schemas.chat import ChatCompletionRequest, InputMessage
from halyard.api.schemas.responses import ResponseRequest
from halyard.hal.errors import RequestError

__all__ = ["as_chat", "input_blamed", "read_items"]

_TEXTS = ("input_text", "output_text", "text")


def as_chat(request: ResponseRequest, before: list[InputMessage]) -> ChatCompletionRequest:
    """The same request in the shape that is served.

    Args:
        before: the conversation that it goes on with.

    Raises:
        RequestError: something in it is malformed or not served; it is named.
    """
    refuse(request)
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        raise RequestError("max_output_tokens must be at least 1", "max_output_tokens")
    if request.truncation not in (None, "auto", "disabled"):
        raise RequestError("truncation must be auto or disabled", "truncation")
    if "message.output_text.logprobs" in (request.include or ()):
        raise RequestError("logprobs are not supported: use /v1/chat/completions", "include")
    if request.background and request.stream:
        raise RequestError("background and stream exclude each other", "background")
    if request.background and request.store is False:
        raise RequestError("background needs store", "background")
    messages = [*before, *read_items(request.input)]
    if not messages:
        raise RequestError("input is empty: give a text or an item", "input")
    if request.instructions:
        messages.insert(0, InputMessage("system", request.instructions))
    chat = ChatCompletionRequest(
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        tools=[_tool(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or [])],
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_form(request.text),
        reasoning_effort=(request.reasoning or {}).get("effort"),
    )
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop",
                 "priority", "cache_salt", "timeout", "chat_template_kwargs", "guided_finish"):  # fmt: skip
        setattr(chat, name, getattr(request, name))
    return chat


@contextmanager
def input_blamed() -> Iterator[None]:
    """What is wrong with the messages of the chat is so with the input that they were made of."""
    try:
        yield
    except RequestError as error:
        if not (error.param or "").startswith("messages"):
            raise
        raise type(error)(str(error), "input") from None


def read_items(given: str | list[dict[str, Any]]) -> list[InputMessage]:
    """Items of a conversation as messages."""
    if isinstance(given, str):
        return [InputMessage("user", given)]
    messages: list[InputMessage] = []
    for number, item in enumerate(given):
        where = f"input[{number}]"
        match item.get("type", "message"):
            case "message":
                role, content = item.get("role"), item.get("content")
                if not isinstance(role, str):
                    raise RequestError("a message needs a role", f"{where}.role")
                messages.append(InputMessage(role, _text(content, f"{where}.content")))
            case "function_call":
                _add_call(messages, item, where)
            case "function_call_output":
                told = _text(item.get("output"), f"{where}.output")
                messages.append(InputMessage("tool", told, tool_call_id=str(item.get("call_id"))))
            case "reasoning":
                pass  # earlier thoughts are not shown to the model again
            case kind:
                raise RequestError(f"an item of type {kind!r} is not supported", where)
    return messages


def _add_call(messages: list[InputMessage], item: dict[str, Any], where: str) -> None:
    """Calls that follow each other, or an assistant's text, are one message."""
    name, arguments = item.get("name"), item.get("arguments", "{}")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise RequestError("a function_call needs name and arguments as strings", where)
    call = {"id": str(item.get("call_id")), "type": "function",
            "function": {"name": name, "arguments": arguments}}  # fmt: skip
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant":
        messages[-1] = InputMessage(
            "assistant", last.content, tool_calls=[*(last.tool_calls or []), call]
        )
    else:
        messages.append(InputMessage("assistant", None, tool_calls=[call]))


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError("content must be text or a list of parts", where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise RequestError(
                f"content of type {kind!r} is not supported: this model reads text",
                f"{where}[{number}]",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"a tool of type {tool.get('type')!r} is not supported: it runs on OpenAI's servers",
            f"{where}.type",
        )
    names = ("name", "description", "parameters")
    return {"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _form(text: dict[str, Any] | None) -> dict[str, Any] | None:
    form = (text or {}).get("format")
    if (text or {}).get("verbosity") not in (None, "medium"):
        raise RequestError("verbosity is not supported: say it in the instructions", "text")
    if not isinstance(form, dict):
        return None
    if form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": form}
    return form
