"""What several endpoints share on the wire."""

from typing import Any

import msgspec

__all__ = [
    "CompletionUsage",
    "ErrorBody",
    "ErrorEnvelope",
    "PromptTokensDetails",
    "SamplingFields",
    "StreamOptions",
    "TokenDistribution",
]


class ErrorBody(msgspec.Struct, frozen=True):
    """One failure, as OpenAI's clients expect it."""

    message: str
    type: str
    param: str | None = None  # the field to blame
    code: str | None = None  # a word for programs


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorBody


class StreamOptions(msgspec.Struct, frozen=True):
    """Only with `stream`."""

    include_usage: bool | None = None  # a last chunk with usage and no choices
    continuous_usage_stats: bool | None = None  # usage on every chunk


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int = 0  # found in the prefix cache


class CompletionUsage(msgspec.Struct, frozen=True):
    """Token counts of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenDistribution(msgspec.Struct, frozen=True):
    """One entry of `prompt_logprobs`, by token id, as in vLLM."""

    logprob: float
    rank: int | None
    decoded_token: str | None


class SamplingFields(msgspec.Struct, kw_only=True):
    """Parameters that chat and text completions have in common. null means the default."""

    model: str | None = None  # the served name; left out: whatever is served
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token id -> -100..100
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Ignored: api/parameters.py says why.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    spaces_between_special_tokens: bool | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None  # lower runs first
    cache_salt: str | None = None  # the prefix cache is shared only among equal salts
    timeout: float | None = (
        None  # seconds; then the answer ends as it is, with stop_reason "deadline"
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # log-probabilities name tokens `token_id:7`
    truncate_prompt_tokens: int | None = None  # keep that many of the prompt's last tokens
    # The form of the answer: at most one of these.
    response_format: dict[str, Any] | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_finish: bool | None = None  # near max_tokens the answer is led to the end of its form
    # Refused: api/parameters.py says why.
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logits_processors: Any = None
    prompt_embeds: Any = None
