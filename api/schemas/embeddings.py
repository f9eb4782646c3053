"""Embeddings on the wire."""

from typing import Any, Literal

import msgspec

from halyard.api.schemas.common import PromptTokensDetails

__all__ = ["Embedding", "EmbeddingList", "EmbeddingRequest", "EmbeddingUsage"]


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings. null means the default."""

    input: str | list[str | int | list[int]]  # text, texts, token ids, or lists of token ids
    model: str | None = None  # the served name; left out: whatever is served
    encoding_format: Literal["float", "base64"] | None = (
        None  # float; base64 is of float32, little-endian
    )
    dimensions: int | None = None  # keep that many leading entries
    pooling: Literal["last", "mean"] | None = None  # hidden states of the last token, or their mean
    normalize: bool | None = None  # false: vectors keep their length instead of length one
    truncate_prompt_tokens: int | None = None  # keep that many of the last tokens; -1: what fits
    add_special_tokens: bool | None = None
    priority: int | None = None  # lower runs first
    cache_salt: str | None = None  # the prefix cache is shared only among equal salts
    # Ignored: api/parameters.py says why.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    request_id: str | None = None


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Token counts of one HTTP request."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Embedding(msgspec.Struct, frozen=True):
    """One vector."""

    index: int  # which of the inputs
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    """The whole answer, in the order of the inputs."""

    id: str
    created: int  # Unix time
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    system_fingerprint: str | None = None
    object: str = "list"
