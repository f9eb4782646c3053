"""Responses that can be fetched and continued: in memory, bounded, the oldest go first."""

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

from halyard.api.errors import NotFoundError
from halyard.api.response_answers import ResponseAnswers
from halyard.api.schemas.chat import InputMessage
from halyard.api.tenants import caller

__all__ = ["ResponseStore", "StoredResponse"]


@dataclass(slots=True)
class StoredResponse:
    """A response and the conversation that led to it."""

    answers: ResponseAnswers
    before: list[InputMessage]  # without instructions: they hold for one response
    items: list[dict[str, Any]]  # the input as it was given
    task: asyncio.Task[Any] | None = field(default=None, repr=False)  # of one in the background
    tenant: str = field(default_factory=lambda: caller().tenant.name)

    @property
    def conversation(self) -> list[InputMessage]:
        return [*self.before, *self.answers.answer()]


class ResponseStore:
    """Belongs to the event loop. Callers see their tenant's responses alone."""

    def __init__(self, capacity: int = 1000) -> None:
        self._capacity = capacity
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, response_id: str, stored: StoredResponse) -> None:
        self._stored[response_id] = stored
        while len(self._stored) > self._capacity:
            # Whoever stores most makes room, so that nobody crowds out another tenant's.
            counts = Counter(one.tenant for one in self._stored.values())
            most = max(counts, key=lambda tenant: counts[tenant])
            oldest = next(name for name, one in self._stored.items() if one.tenant == most)
            self._stored.pop(oldest).answers.cancel()

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """
        Raises:
            NotFoundError: it isn't here, or not any more.
        """
        stored = self._stored.get(response_id)
        if stored is None or stored.tenant != caller().tenant.name:
            raise NotFoundError(
                f"no response {response_id!r} is known: this server keeps the last "
                f"{self._capacity}",
                param,
            )
        return stored

    def drop(self, response_id: str) -> None:
        self.get(response_id).answers.cancel()
        del self._stored[response_id]
