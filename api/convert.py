"""Wire requests become prompts and SamplingParams. What would change the answer but isn't served is refused."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from halyard.api.chat_tools import ChatTools, plain_calls
from halyard.api.parameters import refuse
from halyard.api.prompt_size import MAX_PROMPTS, MAX_STOPS, check_count, check_texts
from halyard.api.schemas.chat import ChatCompletionRequest, InputMessage
from halyard.api.schemas.common import SamplingFields
from halyard.api.schemas.completions import CompletionRequest
from halyard.api.structured import constraint_of
from halyard.hal.errors import RequestError
from halyard.models.tokenizer import Tokenizer
from halyard.runtime.intake import TokenIds
from halyard.runtime.request import MAX_LOGPROBS, SamplingParams

__all__ = [
    "chat_params",
    "chat_prompt",
    "completion_params",
    "completion_prompts",
    "decode_body",
    "token_prompts",
]

T = TypeVar("T", bound=msgspec.Struct)

# Below that many characters, tokenising on the event loop is cheaper than a thread's round trip.
_SHORT_TEXT = 2000
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_RESERVED_TEMPLATE_OPTIONS = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages",
    "return_dict", "return_tensors", "self", "tokenize", "tools",
)  # fmt: skip


def decode_body(body: bytes, kind: type[T]) -> T:
    """Parse JSON strictly: "5" is no number.

    Raises:
        RequestError: malformed JSON, a wrong type or a missing field, named.
    """
    try:
        return msgspec.json.decode(body or b" ", type=kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        param = path.removesuffix("`").lstrip(".") or None
        if param is None and "missing required field" in text:
            param = text.split("`")[1]
        where = f" (at {param})" if param else ""
        raise RequestError(f"{text}{where}", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not valid JSON: {reason}") from None


def completion_params(request: CompletionRequest) -> SamplingParams:
    """Sampling for a text completion. `max_tokens` 0 with `echo` becomes 1: the caller drops it."""
    _refuse_unsupported(request)
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"logprobs must be between 0 and {MAX_LOGPROBS}, got {request.logprobs}", "logprobs"
        )
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    prompt_logprobs = request.prompt_logprobs
    if request.echo:
        max_tokens = 1 if max_tokens == 0 else max_tokens
        if request.logprobs is not None:
            prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    params = _params(
        request, max_tokens=max_tokens, logprobs=request.logprobs, prompt_logprobs=prompt_logprobs
    )
    if request.best_of is None or request.best_of == params.n:
        return params
    if request.best_of < params.n:
        raise RequestError(f"best_of must be at least n ({params.n})", "best_of")
    if request.stream:
        raise RequestError(
            "best_of needs all answers before the best is known: no stream", "best_of"
        )
    # Which is the best is read off the log-probabilities.
    return replace(params, n=request.best_of, logprobs=params.logprobs or 0)


def chat_params(request: ChatCompletionRequest) -> SamplingParams:
    """Sampling for a chat completion. Without a limit the answer may fill the context."""
    _refuse_unsupported(request)
    if request.modalities is not None and request.modalities != ["text"]:
        raise RequestError('modalities must be ["text"]: this model writes text', "modalities")
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {logprobs}", "top_logprobs"
        )
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    max_tokens: int | None = getattr(request, name)
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"{name} must be at least 1, got {max_tokens}", name)
    return _params(
        request,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )


def _refuse_unsupported(request: SamplingFields) -> None:
    refuse(request)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")


def _params(
    request: SamplingFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    if isinstance(request.stop, list):
        check_count(len(request.stop), MAX_STOPS, "stop strings", "stop")
    given: dict[str, Any] = {
        name: value
        for name in (
            "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature",
            "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
            "min_tokens", "include_stop_str_in_output", "skip_special_tokens", "guided_finish",
        )
        if (value := getattr(request, name)) is not None
    }  # fmt: skip
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(request.logit_bias),
        guided=constraint_of(request),
    )


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise RequestError("the keys of logit_bias must be token ids", "logit_bias") from None


async def completion_prompts(
    request: CompletionRequest, tokenizer: Tokenizer | None, max_model_len: int
) -> list[list[int]]:
    """Token ids of every prompt. Errors as `token_prompts`', and if they are too many or too long."""
    prompt = request.prompt
    if prompt and isinstance(prompt, list) and type(prompt[0]) is int:
        known = TokenIds.of(prompt)
        if known is not None:
            return _truncated([known], request.truncate_prompt_tokens)
        if set(map(type, prompt)) == {int}:  # one of them is larger than any token's
            return _truncated([prompt], request.truncate_prompt_tokens)  # type: ignore[list-item]
    texts = [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
    check_count(1 if isinstance(prompt, str) else len(prompt), MAX_PROMPTS, "prompts", "prompt")
    if request.truncate_prompt_tokens is None:
        check_texts(texts, tokenizer, max_model_len, "prompt")
    return await token_prompts(
        request.prompt,
        tokenizer,
        add_special_tokens=request.add_special_tokens is not False,
        truncate=request.truncate_prompt_tokens,
        param="prompt",
    )


async def token_prompts(
    given: str | Sequence[str | int | list[int]],
    tokenizer: Tokenizer | None,
    *,
    add_special_tokens: bool,
    truncate: int | None,
    param: str,
) -> list[list[int]]:
    """Token ids of a text, texts, token ids or lists of them.

    Args:
        truncate: keep that many of each prompt's last tokens.
        param: the user's field that errors name.

    Raises:
        RequestError: mixed or empty, or text where the checkpoint has no tokenizer.
    """
    singles: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if not singles:
        raise RequestError(f"the {param} is empty: give at least one token", param)
    if set(map(type, singles)) == {int}:
        return _truncated([list(singles)], truncate)  # type: ignore[arg-type]
    if all(isinstance(single, list) for single in singles):
        return _truncated(list(singles), truncate)  # type: ignore[arg-type]
    if not all(isinstance(single, str) for single in singles):
        raise RequestError(f"{param} mixes texts and token ids: give one kind", param)
    if tokenizer is None:
        raise RequestError(
            f"this checkpoint has no tokenizer: give the {param} as token ids", param
        )
    texts: list[str] = list(singles)  # type: ignore[arg-type]

    def encode() -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    if sum(map(len, texts)) <= _SHORT_TEXT:
        return _truncated(encode(), truncate)
    return _truncated(await asyncio.to_thread(encode), truncate)


async def chat_prompt(
    request: ChatCompletionRequest, tokenizer: Tokenizer | None, tools: ChatTools | None = None
) -> list[int]:
    """Token ids of a conversation, by the checkpoint's template.

    Raises:
        RequestError: no tokenizer or template, or the messages don't suit it.
    """
    if tokenizer is None:
        raise RequestError(
            "this checkpoint has no tokenizer: use /v1/completions with token ids", "messages"
        )
    knows_developer = "developer" in getattr(tokenizer, "chat_template", "")
    messages = [
        _plain_message(message, f"messages[{index}]", knows_developer)
        for index, message in enumerate(request.messages)
    ]
    options = dict(request.chat_template_kwargs or {})
    for name in _RESERVED_TEMPLATE_OPTIONS:
        if name in options:
            raise RequestError(f"chat_template_kwargs can't set {name}", "chat_template_kwargs")
    if tools is not None:
        options["tools"] = tools.shown
    if request.reasoning_effort is not None:
        options.setdefault("reasoning_effort", request.reasoning_effort)
    generation = request.add_generation_prompt
    if request.continue_final_message:
        options["continue_final_message"] = True
        if generation:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        generation = False
    # A template is code of unknown cost, so it never runs on the event loop.
    prompt = await asyncio.to_thread(
        tokenizer.apply_chat_template, messages, generation is not False, **options
    )
    return _truncated([prompt], request.truncate_prompt_tokens)[0]


def _truncated(prompts: list[list[int]], most: int | None) -> list[list[int]]:
    if most is None:
        return prompts
    if most < 1:
        raise RequestError(
            f"truncate_prompt_tokens must be at least 1, got {most}", "truncate_prompt_tokens"
        )
    return [prompt[-most:] for prompt in prompts]


def _plain_message(message: InputMessage, where: str, knows_developer: bool) -> dict[str, Any]:
    if message.role not in _ROLES:
        raise RequestError(f"role must be one of {', '.join(_ROLES)}, got {message.role!r}",
                           f"{where}.role")  # fmt: skip
    content = message.content
    if isinstance(content, list):
        texts = []
        for index, part in enumerate(content):
            text = part.refusal if part.type == "refusal" else part.text
            if part.type not in ("text", "refusal") or text is None:
                raise RequestError(
                    f"content of type {part.type!r} is not supported: this model reads text",
                    f"{where}.content[{index}]",
                )
            texts.append(text)
        content = "\n".join(texts)
    if content is None and message.role != "assistant":
        raise RequestError(f"a {message.role} message needs content", f"{where}.content")
    role = message.role
    if role == "developer" and not knows_developer:
        role = "system"  # the same under its older name
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    for name in ("name", "reasoning_content", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = plain_calls(message.tool_calls, f"{where}.tool_calls")
    return plain
