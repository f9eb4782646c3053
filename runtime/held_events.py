"""Token events put aside until somebody wants them, as few objects as may be."""

from __future__ import annotations

from halyard.runtime.plan import TokenEvent

__all__ = ["HeldEvents"]


class HeldEvents:
    """Events of one request, in order for each answer.

    Those that bring nothing but tokens become numbers in a list: hundreds of thousands of events
    kept as such would be looked through by every pass of the garbage collector.
    """

    __slots__ = ("_events", "_tokens")

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._tokens: dict[int, list[int]] = {}  # by answer, what came behind its last event

    def add(self, event: TokenEvent) -> None:
        tokens = self._tokens.get(event.index)
        if tokens is not None and _is_plain(event):
            tokens.extend(event.token_ids)
            return
        if tokens:
            self._flush(event.request_id, event.index, tokens)
        self._tokens[event.index] = []
        self._events.append(event)

    def take(self, request_id: str) -> list[TokenEvent]:
        """All of them; none are left."""
        for index, tokens in self._tokens.items():
            if tokens:
                self._flush(request_id, index, tokens)
        events, self._events = self._events, []
        self._tokens.clear()
        return events

    def _flush(self, request_id: str, index: int, tokens: list[int]) -> None:
        self._events.append(TokenEvent(request_id, index, tuple(tokens)))


def _is_plain(event: TokenEvent) -> bool:
    return (
        event.finish_reason is None
        and event.logprobs is None
        and event.prompt_logprobs is None
        and event.embedding is None
    )
