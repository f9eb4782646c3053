"""The error tree. Every error a user can cause is a `HalyardError` whose text is one clear line."""

__all__ = [
    "BackendUnavailableError",
    "CapacityError",
    "ConfigError",
    "ContextLengthError",
    "ContractError",
    "DeviceMemoryError",
    "EngineDeadError",
    "HalyardError",
    "ModelError",
    "QueueFullError",
    "RequestError",
]


class HalyardError(Exception):
    """Root of all errors raised on purpose. `str(error)` is one line that says what to do."""


class ConfigError(HalyardError):
    """An option, a command line or a file such as hw_matrix.yaml is wrong."""


class ModelError(HalyardError):
    """A model can't be found, read, trusted or served (unknown path, corrupt weights, architecture)."""


class BackendUnavailableError(HalyardError):
    """No backend, or not the one asked for, can run here; the text holds every reason."""


class CapacityError(HalyardError):
    """The device has not enough memory for the weights or for one sequence."""


class DeviceMemoryError(HalyardError):
    """The device's memory ran out in the middle of a step; with less to do, another may succeed."""

    def __init__(self, message: str, moved: bool = True) -> None:
        super().__init__(message)
        self.moved = moved  # whether the step's block moves were made before


class ContractError(HalyardError):
    """A backend part broke the contract or was built for another version of it."""


class RequestError(HalyardError):
    """A request is invalid. `param` names the offending field, if one field is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """Prompt and answer do not fit in the model's context."""


class QueueFullError(HalyardError):
    """The waiting queue is full. `retry_after` is the advised delay in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(HalyardError):
    """The engine stopped; the text says why. No request can be answered until it is restarted.

    `retry_after`: seconds until that may be so; None: nobody restarts it.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
