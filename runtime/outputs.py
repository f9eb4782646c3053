"""What generation gives back: whole outputs for LLM, deltas for streams. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from halyard.runtime.plan import FinishReason, TokenLogprob

__all__ = [
    "CompletionDelta",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "RequestDelta",
    "RequestOutput",
    "merge",
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


class CompletionDelta(NamedTuple):
    """What is new about one answer. Text is cut so that stop strings never leak.

    A named tuple, like TokenEvent: hundreds are made a step.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index on purpose
    text: str  # may be empty: held back until characters and stop strings are decided
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # with finish_reason "error": one line


class RequestDelta(NamedTuple):
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

    @property
    def failed(self) -> bool:
        """Whether it tells of an error."""
        return any(new.error is not None for new in self.completions)


def merge(deltas: Sequence[RequestDelta]) -> RequestDelta:
    """Deltas of one request that follow each other, as one."""
    parts: dict[int, list[CompletionDelta]] = {}
    for delta in deltas:
        for new in delta.completions:
            parts.setdefault(new.index, []).append(new)
    return RequestDelta(
        request_id=deltas[0].request_id,
        completions=tuple(_join(own) for _, own in sorted(parts.items())),
        num_prompt_tokens=deltas[0].num_prompt_tokens,
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        prompt_logprobs=next(
            (one.prompt_logprobs for one in deltas if one.prompt_logprobs is not None), None
        ),
        finished=deltas[-1].finished,
        started=next((delta.started for delta in deltas if delta.started), 0.0),
        embedding=next((one.embedding for one in deltas if one.embedding is not None), None),
    )


def _join(parts: list[CompletionDelta]) -> CompletionDelta:
    last = parts[-1]
    if len(parts) == 1:
        return last
    logprobs = None
    if any(part.logprobs is not None for part in parts):
        logprobs = tuple(token for part in parts for token in part.logprobs or ())
    return last._replace(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=logprobs,
    )
