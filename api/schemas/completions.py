"""Text completions on the wire."""

import msgspec

from halyard.api.schemas.common import CompletionUsage, SamplingFields, TokenDistribution

__all__ = [
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionLogprobs",
    "CompletionRequest",
]


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]  # text, texts, token ids, or lists of token ids
    max_tokens: int | None = 16
    echo: bool | None = None  # the prompt comes back before the answer
    logprobs: int | None = None
    best_of: int | None = None  # that many answers are made, the n most likely ones are returned
    suffix: str | None = None
    add_special_tokens: bool | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # where the token begins in `text`


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer; index = prompt number * n + answer number."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[dict[str, TokenDistribution] | None] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True):
    """The whole answer."""

    id: str
    created: int  # Unix time
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    system_fingerprint: str | None = None
    object: str = "text_completion"


class CompletionChunk(msgspec.Struct, frozen=True):
    """One server-sent event."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None = None
    object: str = "text_completion"
    usage: CompletionUsage | msgspec.UnsetType | None = msgspec.UNSET
