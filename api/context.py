"""Which HTTP request the code at hand works for: log lines and spans are named by it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halyard.api.traces import Traces

__all__ = ["RequestContext", "current"]


@dataclass(slots=True)
class RequestContext:
    """One HTTP request. Lives as long as its answer is sent."""

    request_id: str  # X-Request-Id
    tenant: str = ""  # whose API key it brought; empty until known
    trace_id: str = ""  # 32 hex digits, if it is traced
    span: Any = None  # its OpenTelemetry span, if it is traced
    traces: Traces | None = None  # makes spans of it; None: none are wanted


current: ContextVar[RequestContext | None] = ContextVar("halyard_request", default=None)
"""The request that this task answers; None outside of requests."""
