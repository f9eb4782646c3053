"""Batches on the wire."""

from typing import Any

import msgspec

__all__ = ["BatchRequest"]


class BatchRequest(msgspec.Struct, kw_only=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str  # the url of every line
    completion_window: str = "24h"  # no other
    metadata: dict[str, Any] | None = None
