"""What controllers are given, and small things they share."""

import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from litestar import Request

from halyard.api.errors import to_api_error
from halyard.api.host import EngineHost
from halyard.hal.errors import EngineDeadError, HalyardError

__all__ = ["error_observer", "host_of", "new_id", "now"]

logger = logging.getLogger("halyard.api")


def host_of(request: Request[Any, Any, Any]) -> EngineHost:
    """The engine's host that the application was made around."""
    host: EngineHost = request.app.state.host
    return host


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


def error_observer(
    host: EngineHost, request: Request[Any, Any, Any]
) -> Callable[[BaseException], None]:
    """Counts and logs a failure after the handler has returned."""
    path = request.scope["path"]

    def observe(error: BaseException) -> None:
        told = to_api_error(error)
        host.observe_error(told.code or told.type)
        if isinstance(error, EngineDeadError):
            return  # the engine's client says so once, for all its requests
        if isinstance(error, HalyardError):
            logger.warning("%s: %s", path, error)
        else:
            logger.error("%s failed", path, exc_info=error)

    return observe
