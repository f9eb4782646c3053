"""Events that bring one token and nothing else, as columns: nearly all that an engine says. No torch.

As events, each costs both processes as much as a token's way to text.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from halyard.runtime.plan import TokenEvent, make_event

__all__ = ["Joiner", "Splitter", "TokenColumns"]


class TokenColumns(msgspec.Struct, array_like=True, gc=False):
    """One row an event, of answer 0 of its request. Tokens alone: in the rows of the columns before."""

    request_ids: list[str] = []
    token_ids: list[int] = []
    num_cached_tokens: list[int] = []
    started: list[float] = []


class Splitter:
    """The engine's end. Its columns are for one `Joiner`, which must get them all, in order."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told = TokenColumns()

    def split(self, events: Iterable[TokenEvent]) -> tuple[TokenColumns, list[TokenEvent]]:
        """Events of a step: those that fit columns, and the others, which come after these.

        What follows another event of its request is one of the others too: their order stays.
        """
        requests: list[str] = []
        tokens: list[int] = []
        cached: list[int] = []
        started: list[float] = []
        others: list[TokenEvent] = []
        behind: set[str] = set()
        for event in events:
            request_id, index, new, logprobs, of_prompt, reason, _, hits, _, since, vector = event
            if (
                reason is not None
                or index
                or len(new) != 1
                or logprobs is not None
                or of_prompt is not None
                or vector is not None
                or request_id in behind
            ):
                behind.add(request_id)
                others.append(event)
                continue
            requests.append(request_id)
            tokens.append(new[0])
            cached.append(hits)
            started.append(since)
        told = self._told
        if (
            requests == told.request_ids
            and cached == told.num_cached_tokens
            and started == told.started
        ):
            return TokenColumns(token_ids=tokens), others  # most steps have the last one's rows
        if requests:
            self._told = TokenColumns(requests, tokens, cached, started)
            return self._told, others
        return TokenColumns(), others


class Joiner:
    """The owner's end: a request's tokens of several steps become one event."""

    __slots__ = ("_joined", "_open", "_told")

    def __init__(self) -> None:
        self._told = TokenColumns()
        self._joined: list[TokenEvent | _Run] = []
        self._open: dict[
            str, list[int]
        ] = {}  # tokens of a request's latest event, if they can grow

    def add(self, columns: TokenColumns, others: list[TokenEvent]) -> None:
        """The next step's."""
        if columns.request_ids:
            self._told = columns
        told, growing = self._told, self._open
        if columns.token_ids:
            for row, request_id in enumerate(told.request_ids):
                tokens = growing.get(request_id)
                if tokens is None:
                    tokens = growing[request_id] = []
                    cached, started = told.num_cached_tokens[row], told.started[row]
                    self._joined.append(_Run(request_id, tokens, cached, started))
                tokens.append(columns.token_ids[row])
        for event in others:
            growing.pop(event.request_id, None)
            self._joined.append(event)

    def take(self) -> list[TokenEvent]:
        """All that was added since the last call, in order for each answer."""
        joined, self._joined = self._joined, []
        self._open.clear()
        return [one.event() if isinstance(one, _Run) else one for one in joined]


class _Run:
    """One event to be."""

    __slots__ = ("num_cached_tokens", "request_id", "started", "tokens")

    def __init__(
        self, request_id: str, tokens: list[int], num_cached_tokens: int, started: float
    ) -> None:
        self.request_id = request_id
        self.tokens = tokens
        self.num_cached_tokens = num_cached_tokens
        self.started = started

    def event(self) -> TokenEvent:
        tokens = tuple(self.tokens)
        cached, started = self.num_cached_tokens, self.started
        return make_event(
            (self.request_id, 0, tokens, None, None, None, None, cached, None, started, None)
        )
