"""A chat request becomes a running generation: shared by every endpoint that chats."""

from dataclasses import dataclass, replace

from halyard.api.answer_reader import ReadingRules
from halyard.api.chat_tools import chat_tools
from halyard.api.convert import chat_params, chat_prompt
from halyard.api.deps import new_id
from halyard.api.dialect import Dialect, detect
from halyard.api.generation import Generation
from halyard.api.prompt_size import check_texts
from halyard.api.schemas.chat import ChatCompletionRequest
from halyard.hal.errors import ContextLengthError, RequestError
from halyard.models.tokenizer import Tokenizer
from halyard.runtime.client import Client
from halyard.runtime.request import SamplingParams

__all__ = ["ChatPlan", "plan_chat", "start_chat"]

_TAIL = 16  # tokens at the prompt's end that tell whether it opens a thought


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request, understood."""

    client: Client  # whose tokenizer made the prompt; it answers, whoever else is there by then
    prompt: list[int]
    params: SamplingParams
    rules: ReadingRules


async def plan_chat(client: Client, request: ChatCompletionRequest) -> ChatPlan:
    """Prompt, sampling, and how to read the answers.

    Raises:
        RequestError: the request is invalid.
    """
    tokenizer = client.tokenizer
    dialect = detect(tokenizer)
    params = chat_params(request)
    tools = chat_tools(request, dialect)
    if request.truncate_prompt_tokens is None:
        contents = (m.content for m in request.messages if isinstance(m.content, str))
        check_texts(contents, tokenizer, client.max_model_len, "messages")
    prompt = await chat_prompt(request, tokenizer, tools)
    thinking = _thinking(dialect, tokenizer, prompt)
    if tools is not None:
        constraint = tools.constraint(dialect, thinking)
        if constraint is not None and params.guided is not None:
            raise RequestError(
                f"{params.guided.param} and a tool_choice that forces calls exclude each other",
                params.guided.param,
            )
        if constraint is not None:
            params = replace(params, guided=constraint)
        if dialect.hides_markers:
            params = replace(params, skip_special_tokens=False)
    if params.guided is not None and thinking is not None and params.guided.kind != "lark":
        params = replace(params, guided=dialect.after_thought(params.guided, thinking))
    await client.prepare(params)
    rules = ReadingRules(
        dialect,
        thinking,
        tools.names if tools is not None else None,
        request.include_reasoning is not False,
        tools.most_calls if tools is not None else None,
    )
    return ChatPlan(client, prompt, params, rules)


def start_chat(
    request: ChatCompletionRequest,
    plan: ChatPlan,
    answer_id: str | None = None,
) -> Generation:
    """Submit it."""
    try:
        return Generation(
            plan.client,
            answer_id or new_id("chatcmpl"),
            [plan.prompt],
            plan.params,
            priority=request.priority,
            cache_salt=request.cache_salt,
            timeout=request.timeout,
        )
    except ContextLengthError as error:
        raise ContextLengthError(str(error), "messages") from None


def _thinking(dialect: Dialect, tokenizer: Tokenizer | None, prompt: list[int]) -> bool | None:
    """Whether the prompt ends within a thought; None: the answer has none."""
    if not dialect.thinks or tokenizer is None:
        return None
    tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
    if tail.endswith("<think>"):
        return True
    return None if tail.endswith("</think>") else False
