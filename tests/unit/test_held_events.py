"""Held events say the same as the events that were held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from halyard.runtime.held_events import HeldEvents
from halyard.runtime.plan import TokenEvent, TokenLogprob

EVENT = st.builds(
    lambda index, tokens, scored, ends, cached: TokenEvent(
        "r",
        index,
        tuple(tokens),
        logprobs=tuple(TokenLogprob(t, -1.0, 1, ()) for t in tokens) if scored else None,
        finish_reason="length" if ends else None,
        num_cached_tokens=cached,
    ),
    st.integers(0, 2),
    st.lists(st.integers(0, 9), max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
)


@given(st.lists(st.one_of(EVENT, st.none()), max_size=30))
def test_nothing_is_lost_or_put_in_another_order(events: list[TokenEvent | None]) -> None:
    held = HeldEvents()
    came: list[TokenEvent] = []
    went: list[TokenEvent] = []
    for event in events:
        if event is None:
            went += held.take("r")
        else:
            came.append(event)
            held.add(event)
    went += held.take("r")
    assert held.take("r") == []
    for index in range(3):
        before, after = ([e for e in all_ if e.index == index] for all_ in (came, went))
        assert [t for e in after for t in e.token_ids] == [t for e in before for t in e.token_ids]
        told = [e for e in before if e.logprobs is not None or e.finish_reason is not None]
        assert [e for e in after if e.logprobs is not None or e.finish_reason is not None] == told
        assert bool(before) == bool(after)
        if before:
            assert after[0].num_cached_tokens == before[0].num_cached_tokens
    assert len(went) <= len(came)


def test_tokens_alone_are_one_event() -> None:
    held = HeldEvents()
    for token in range(1000):
        held.add(TokenEvent("r", 0, (token,)))
    assert [len(e.token_ids) for e in held.take("r")] == [1, 999]
