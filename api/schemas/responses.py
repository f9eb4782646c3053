"""OpenAI's responses on the wire: the request. Answers are plain objects, see api/response_answers.py."""

from typing import Any

import msgspec

__all__ = ["ResponseRequest"]


class ResponseRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]  # a user's text, or items of a conversation
    model: str | None = None
    instructions: str | None = None  # a system message for this response alone
    previous_response_id: str | None = None  # the conversation goes on from there
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None  # the form of the answer
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    stream: bool | None = None
    store: bool | None = None  # default true: it can be fetched and continued
    background: bool | None = None  # answered at once; fetch it later
    truncation: str | None = None  # auto or disabled; too long an input is refused in any case
    metadata: dict[str, Any] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timeout: float | None = None  # seconds; then the answer ends as it is
    chat_template_kwargs: dict[str, Any] | None = None
    guided_finish: bool | None = None  # near max_output_tokens it is led to the end of its form
    # Ignored: api/parameters.py says why.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    include: list[str] | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    # Refused: api/parameters.py says why.
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None
