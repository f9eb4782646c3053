"""What a client needs of an engine, in whatever thread or process it runs. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from halyard.runtime.intake import Intake, Limits
from halyard.runtime.plan import TokenEvent
from halyard.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from halyard.runtime.engine import EngineStats
    from halyard.runtime.metrics import Metrics
    from halyard.runtime.picture import EnginePicture

__all__ = ["Deliver", "Died", "EngineFacts", "EnginePort"]

Deliver = Callable[[list[TokenEvent]], None]
"""Takes the events of one step, or of a few."""

Died = Callable[[str], None]
"""Is told, once, why no event will come any more."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is fixed about an engine once it is loaded. Plain data: it crosses processes."""

    model_name: str  # what the API calls the model
    backend_name: str  # a row of hw_matrix.yaml
    limits: Limits  # what requests are checked against
    max_queue_len: int | None = None  # most requests that wait; None: no limit
    device_name: str = ""  # for people
    dtype: str = ""  # of weights and activations
    bytes_per_block: int = 0  # of KV
    seed: int = 0  # of requests that bring none
    has_tokenizer: bool = False  # so that answers can be held to a grammar
    cost_per_hour: float | None = None  # of such a machine, as hw_matrix.yaml says
    start_seconds: dict[str, float] = field(default_factory=dict)  # of its start, by phase
    provenance: dict[str, Any] = field(default_factory=dict)  # what decides its answers
    plan: dict[str, Any] = field(default_factory=dict)  # as `halyard plan --json` prints it


class EnginePort(Protocol):
    """One engine. `start` binds it to an event loop; all methods belong to that loop's thread.

    None but `prepare`, `picture` and `close` waits for the engine.
    """

    facts: EngineFacts
    intake: Intake  # makes this engine's requests
    metrics: Metrics  # of its client and its steps

    @property
    def alive(self) -> bool:
        """Whether it takes requests and answers them."""

    @property
    def num_waiting(self) -> int:
        """Requests added that do not run yet."""

    def start(self, deliver: Deliver, died: Died) -> None:
        """Begin to work. Called once, on the event loop that both functions will be called on."""

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Give up a request, or one of its answers. Events that are under way may still come."""

    def stats(self) -> EngineStats:
        """Now, or a fraction of a second ago."""

    async def picture(self) -> EnginePicture:
        """Blocks and sequences after the step that runs.

        Raises:
            EngineDeadError: the engine is dead, or dies meanwhile.
        """

    async def prepare(self, params: SamplingParams) -> None:
        """Compile the constraint of a request that is about to come.

        Raises:
            RequestError: it is malformed, impossible or too complex.
        """

    async def close(self) -> None:
        """Stop at the next step's end and free everything. Idempotent."""
