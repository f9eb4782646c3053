"""What an engine says as columns comes out as the same events, a request's tokens joined."""

from __future__ import annotations

import random

import pytest

from halyard.runtime.messages import Channel, Step, encode
from halyard.runtime.plan import TokenEvent, TokenLogprob
from halyard.runtime.token_columns import Joiner, Splitter, TokenColumns


def plain(request_id: str, token: int, index: int = 0, cached: int = 3) -> TokenEvent:
    return TokenEvent(request_id, index, (token,), num_cached_tokens=cached, started=1.5)


def special(request_id: str, kind: int, index: int) -> TokenEvent:
    """An event that says more than a token."""
    logprobs = (TokenLogprob(5, -0.5, 1, ((5, -0.5),)),)
    return (
        TokenEvent(request_id, index, (5,), logprobs),
        TokenEvent(request_id, index, (5,), None, logprobs),
        TokenEvent(request_id, index, (5, 6)),
        TokenEvent(request_id, index),
        TokenEvent(request_id, index, (5,), finish_reason="stop", stop_reason="x"),
        TokenEvent(request_id, index, finish_reason="error", error="broken"),
        TokenEvent(request_id, index, finish_reason="stop", embedding=b"1234"),
    )[kind]


def told(events: list[TokenEvent]) -> dict[tuple[str, int], list[object]]:
    """What each answer's events say, with tokens one by one."""
    said: dict[tuple[str, int], list[object]] = {}
    for event in events:
        own = said.setdefault((event.request_id, event.index), [])
        bare = event._replace(token_ids=(), num_cached_tokens=0, started=0.0)
        if bare == TokenEvent(event.request_id, event.index) and event.token_ids:
            own += event.token_ids
        else:
            own.append(event)
    return said


@pytest.mark.parametrize("seed", range(20))
def test_any_events_come_over_in_order(seed: int) -> None:
    draw = random.Random(seed)
    splitter, joiner, channel = Splitter(), Joiner(), Channel.__new__(Channel)
    channel._buffer = bytearray()
    sent: list[TokenEvent] = []
    got: list[TokenEvent] = []
    for _ in range(60):
        names = "abc" if draw.random() < 0.7 else draw.choices("abcd", k=draw.randrange(5))
        events = [
            plain(name, draw.randrange(100), draw.choice((0, 0, 0, 1)))
            if draw.random() < 0.9
            else special(name, draw.randrange(7), draw.randrange(2))
            for name in names
        ]
        sent += events
        columns, others = splitter.split(events)
        channel._buffer += encode(Step(others, 0, 0, True, tokens=columns))
        for step in channel._complete():
            joiner.add(step.tokens, step.events)
        if draw.random() < 0.3:
            got += joiner.take()
    got += joiner.take()
    assert told(got) == told(sent)


def test_rows_of_the_step_before_are_not_told_again_and_a_change_is() -> None:
    splitter, joiner = Splitter(), Joiner()
    first = [plain("a", 1), plain("b", 2)]
    splitter.split(first)
    assert splitter.split([plain("a", 3), plain("b", 4)])[0] == TokenColumns(token_ids=[3, 4])
    assert splitter.split([])[0] == TokenColumns()
    assert splitter.split([plain("a", 5), plain("b", 6)])[0] == TokenColumns(token_ids=[5, 6])
    assert splitter.split([plain("a", 7), plain("b", 8, cached=4)])[0].num_cached_tokens == [3, 4]
    splitter = Splitter()
    for step in (first, [], [plain("a", 3), plain("b", 4)], [plain("b", 5)]):
        joiner.add(*splitter.split(step))
    assert joiner.take() == [
        TokenEvent("a", 0, (1, 3), num_cached_tokens=3, started=1.5),
        TokenEvent("b", 0, (2, 4, 5), num_cached_tokens=3, started=1.5),
    ]
    assert joiner.take() == []


def test_a_single_step_comes_as_it_was() -> None:
    splitter, joiner = Splitter(), Joiner()
    events = [plain("a", 1), plain("b", 2), TokenEvent("c", 0, (3,), finish_reason="length")]
    joiner.add(*splitter.split(events))
    assert joiner.take() == events
