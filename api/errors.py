"""The one place where errors become HTTP: every failure leaves in OpenAI's envelope."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from halyard.api.limits import RateLimitedError
from halyard.api.schemas.common import ErrorBody, ErrorEnvelope
from halyard.hal.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    DeviceMemoryError,
    EngineDeadError,
    HalyardError,
    ModelError,
    QueueFullError,
    RequestError,
)

__all__ = [
    "AdminOffError",
    "ApiError",
    "BusyError",
    "DeadlineError",
    "ForbiddenError",
    "ModelNotFoundError",
    "NotFoundError",
    "NotReadyError",
    "UnauthorizedError",
    "exception_handler",
    "to_api_error",
]

logger = logging.getLogger("halyard.api")

INTERNAL = "the server failed on this request; its log says why"
_PLAIN_WORDS = {
    404: "no such route: {method} {path}; GET /schema lists what there is",
    405: "{path} does not take {method}",
    413: "the request body is too large",
    500: INTERNAL,
}


class NotReadyError(HalyardError):
    """The engine is still loading, or the server is going away."""


class UnauthorizedError(HalyardError):
    """The request brings no key, or one that is not valid."""


class ForbiddenError(HalyardError):
    """The key is valid, but not for that; `param` says which field asked for it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class DeadlineError(HalyardError):
    """The time given to a request passed before its answer had begun."""


class AdminOffError(HalyardError):
    """Routes below /admin do nothing here."""


class BusyError(HalyardError):
    """Something of the kind is under way already."""


class ModelNotFoundError(HalyardError):
    """The request names a model that is not served."""


class NotFoundError(HalyardError):
    """Something that the request names is not here; `param` says which field named it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class ApiError:
    """An answer that is not a success."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        envelope = ErrorEnvelope(ErrorBody(self.message, self.type, self.param, self.code))
        return msgspec.json.encode(envelope)


def to_api_error(error: BaseException) -> ApiError:
    """What a client is told about an error. Anything unforeseen is a 500 without details."""
    message = str(error)
    match error:
        case ContextLengthError():
            return _invalid(message, error.param, "context_length_exceeded")
        case RequestError():
            return _invalid(message, error.param, "invalid_value" if error.param else None)
        case ModelNotFoundError():
            return ApiError(404, message, "invalid_request_error", "model", "model_not_found")
        case NotFoundError():
            return ApiError(404, message, "invalid_request_error", error.param, "not_found")
        case QueueFullError():
            wait = _retry_after(error.retry_after)
            return ApiError(429, message, "rate_limit_error", None, "queue_full", wait)
        case RateLimitedError():
            wait = _retry_after(error.retry_after)
            return ApiError(429, message, "rate_limit_error", None, "rate_limit_exceeded", wait)
        case UnauthorizedError():
            return ApiError(401, message, "invalid_request_error", None, "invalid_api_key")
        case ForbiddenError():
            return ApiError(403, message, "permission_error", error.param, "permission_denied")
        case DeadlineError():
            no = {"x-should-retry": "false"}  # OpenAI's and Anthropic's clients heed it
            return ApiError(504, message, "timeout_error", None, "deadline_exceeded", no)
        case NotReadyError():
            wait = {"Retry-After": "1"}
            return ApiError(503, message, "service_unavailable", None, "not_ready", wait)
        case EngineDeadError():
            wait = (
                {}
                if error.retry_after is None
                else {"Retry-After": str(math.ceil(error.retry_after))}
            )
            return ApiError(503, message, "service_unavailable", None, "engine_dead", wait)
        case DeviceMemoryError():
            wait = {"Retry-After": "1"}
            return ApiError(503, message, "service_unavailable", None, "out_of_memory", wait)
        case AdminOffError():
            return ApiError(403, message, "permission_error", None, "admin_off")
        case BusyError():
            return ApiError(409, message, "invalid_request_error", None, "busy")
        case ModelError() | ConfigError():
            return _invalid(message, "model", "model_unusable")
        case CapacityError():
            return ApiError(503, message, "service_unavailable", None, "capacity")
        case HalyardError():
            return ApiError(500, message, "server_error", None, "internal_error")
        case HTTPException():
            return _from_http(error)
    return ApiError(500, INTERNAL, "server_error", None, "internal_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _invalid(message: str, param: str | None, code: str | None) -> ApiError:
    return ApiError(400, message, "invalid_request_error", param, code)


def _from_http(error: HTTPException) -> ApiError:
    status = error.status_code
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        wrong = error.extra[0]  # of the parameters in the address
        return _invalid(f"{wrong['key']}: {wrong['message']}", wrong["key"], "invalid_value")
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(status)
    headers = {
        name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"
    }
    return ApiError(status, error.detail, kind, None, code, headers)


def exception_handler(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's way in: for errors of handlers, of routing and of reading the body."""
    told = to_api_error(error)
    request.app.state.host.observe_error(told.code or told.type)
    if told.status >= 500 and not isinstance(error, NotReadyError | EngineDeadError):
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    if isinstance(error, HTTPException) and told.status in _PLAIN_WORDS:
        plain = _PLAIN_WORDS[told.status].format(method=request.method, path=request.url.path)
        told = ApiError(told.status, plain, told.type, None, told.code, told.headers)
    return Response(
        content=told.body(),
        status_code=told.status,
        media_type="application/json",
        headers=told.headers,
    )
