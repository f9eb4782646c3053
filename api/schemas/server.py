"""Models, health and status on the wire."""

import msgspec

from halyard.api.state import State

__all__ = ["Health", "ModelCard", "ModelList", "Readiness", "Status", "VersionInfo"]


class ModelCard(msgspec.Struct, frozen=True):
    """A model that is served."""

    id: str
    created: int  # Unix time of the server's start
    max_model_len: int  # tokens of prompt and answer together
    root: str  # the model behind an alias
    object: str = "model"
    owned_by: str = "halyard"


class ModelList(msgspec.Struct, frozen=True):
    """GET /v1/models."""

    data: list[ModelCard]
    object: str = "list"


class Health(msgspec.Struct, frozen=True):
    """Whether the process needs no new start."""

    status: str = "ok"  # or "failed": the engine stays down


class Readiness(msgspec.Struct, frozen=True):
    """Whether requests would be answered now."""

    ready: bool
    reason: str  # "ready", or why not; in general words where keys exist and none was brought
    state: State


class VersionInfo(msgspec.Struct, frozen=True):
    """GET /version."""

    version: str


class Status(msgspec.Struct, frozen=True):
    """What the page shows."""

    ready: bool
    reason: str
    version: str
    state: State
    model: str | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    has_chat_template: bool = False
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    host_blocks_total: int = 0
    host_blocks_used: int = 0
    running: int = 0
    waiting: int = 0
    tokens_per_second: float = 0.0  # generated, all requests, over the last seconds
    generated_tokens: int = 0
    uptime_seconds: float = 0.0
