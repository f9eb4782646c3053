"""What the page asks for: curves, requests, blocks, the plan, the conformance matrix."""

from typing import Any

import msgspec

__all__ = [
    "Blocks",
    "ConformanceCell",
    "ConformanceMatrix",
    "ConformanceRow",
    "History",
    "HistorySample",
    "Live",
    "Plan",
    "SequenceView",
]


class HistorySample(msgspec.Struct, frozen=True):
    """A server at one moment; latencies in seconds, null where there were none lately."""

    time: float  # Unix time
    tokens_per_second: float
    prompt_tokens_per_second: float
    running: int
    waiting: int
    kv_usage: float  # 0 to 1
    first_token_p50: float | None = None
    first_token_p95: float | None = None
    between_tokens_p50: float | None = None
    between_tokens_p95: float | None = None


class History(msgspec.Struct, frozen=True):
    """GET /status/history."""

    seconds: float  # between two samples
    samples: list[HistorySample]  # oldest first


class SequenceView(msgspec.Struct, frozen=True):
    """A sequence that waits or runs."""

    id: str
    tenant: str
    state: str  # waiting, prefill, decode, swapped
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    answer_tokens: int
    max_tokens: int
    blocks: int
    age_seconds: float


class Blocks(msgspec.Struct, frozen=True):
    """One tier: two bits a block (0 free, 1 cached, 2 used, 3 shared), lowest bits first."""

    count: int
    states: str  # base64
    free: int
    cached: int
    used: int
    shared: int


class Live(msgspec.Struct, frozen=True):
    """GET /status/live."""

    available: bool  # false: no engine, or it is in a long step; then the rest is empty
    block_size: int = 0  # tokens
    running: int = 0
    waiting: int = 0
    swapped: int = 0
    sequences: list[SequenceView] = []  # at most 500: running, swapped, waiting
    device: Blocks | None = None
    host: Blocks | None = None


class Plan(msgspec.Struct, frozen=True):
    """GET /status/plan."""

    plan: dict[str, Any] | None  # as `halyard plan --json`; null until an engine is there
    start_seconds: dict[str, float] = {}  # of the engine's start, by phase
    fallbacks: dict[str, int] = {}  # slower ways taken, by part; the log says why


class ConformanceCell(msgspec.Struct, frozen=True):
    """Cases of one level for one data type."""

    passed: int = 0
    failed: int = 0  # crashed and hung ones too
    not_claimed: int = 0


class ConformanceRow(msgspec.Struct, frozen=True):
    """A backend of hw_matrix.yaml and what its report says, if there is one."""

    backend: str
    device: str
    kernels: str
    graph: str
    status: str  # verified, compiles, untested, unsupported
    role: str
    date: str | None = None
    hardware: str | None = None
    dtypes: dict[str, dict[str, ConformanceCell]] = {}  # data type -> level -> cases


class ConformanceMatrix(msgspec.Struct, frozen=True):
    """GET /status/conformance."""

    levels: dict[str, str]  # name -> what it tests
    rows: list[ConformanceRow]
    running: str | None = None  # the backend that serves now
