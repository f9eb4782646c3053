"""What generation gives back: whole outputs for LLM, deltas for streams. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from halyard.runtime.plan import FinishReason, TokenLogprob

__all__ = [
    "CompletionDelta",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "RequestDelta",
    "RequestOutput",
]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token of a distribution."""

    logprob: float  # natural logarithm
    rank: int | None  # 1: the most likely
    decoded_token: str | None  # None: the checkpoint has no tokenizer


@dataclass(slots=True)
class CompletionOutput:
    """One answer. Same field names as vLLM's."""

    index: int
    text: str = ""  # empty when the checkpoint has no tokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None  # one a token, if asked for: by token id
    cumulative_logprob: float | None = None  # sum over the answer's tokens, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its n answers."""

    request_id: str
    prompt: str | None  # the text, where the prompt was given as text
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # one a prompt token; first None
    num_cached_tokens: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One vector."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """One prompt and its vector. Same field names as vLLM's."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What is new about one answer. Text is cut so that stop strings never leak."""

    index: int
    text: str  # may be empty: held back until characters and stop strings are decided
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # with finish_reason "error": one line


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """What is new about a request since the last delta of its stream."""

    request_id: str
    completions: tuple[CompletionDelta, ...]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = (
        None  # once, with the first answer token
    )
    finished: bool = False  # every answer has ended
    started: float = 0.0  # time.monotonic() when its first step was planned; 0: not known
    embedding: bytes | None = None  # of a request that pools, once: float32 [hidden]
