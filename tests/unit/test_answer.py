"""Stop strings and the bookkeeping of answers."""

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halyard.runtime.answer import Answers, StopMatcher
from halyard.runtime.outputs import CompletionDelta, RequestDelta, merge
from halyard.runtime.plan import TokenEvent, TokenLogprob
from halyard.runtime.request import Request, SamplingParams


class Letters:
    """Token ids are code points."""

    def push(self, token_ids: tuple[int, ...]) -> str:
        return "".join(map(chr, token_ids))

    def flush(self) -> str:
        return ""


def request(**params: object) -> Request:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return Request("r", (1, 2, 3), sampling, max_tokens=sampling.max_tokens or 16)


def feed(answers: Answers, text: str, *, index: int = 0, finish: str | None = None) -> str:
    delta = answers.feed(
        [TokenEvent("r", index, tuple(map(ord, text)), finish_reason=finish)]  # type: ignore[arg-type]
    )
    return "".join(c.text for c in delta.completions) if delta else ""


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    answers = Answers(request(stop=["END"]), Letters)
    assert feed(answers, "xE") == "x"
    assert feed(answers, "N") == ""
    assert feed(answers, "Q") == "ENQ"


def test_a_stop_string_ends_the_answer_and_never_shows() -> None:
    answers = Answers(request(stop=["END"]), Letters)
    assert feed(answers, "abE") == "ab"
    delta = answers.feed([TokenEvent("r", 0, tuple(map(ord, "NDzz")))])
    assert delta is not None
    (completion,) = delta.completions
    assert completion.text == ""
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == "END"
    assert completion.token_ids == tuple(map(ord, "ND"))  # tokens after the stop are not reported
    assert answers.abandoned == [0]
    assert answers.finished
    assert answers.feed([TokenEvent("r", 0, (65,))]) is None


def test_the_stop_string_is_kept_when_asked_for() -> None:
    answers = Answers(request(stop="END", include_stop_str_in_output=True), Letters)
    assert feed(answers, "abENDc") == "abEND"


def test_held_text_is_released_at_the_end() -> None:
    answers = Answers(request(stop="END"), Letters)
    assert feed(answers, "EN", finish="length") == "EN"


@pytest.mark.parametrize(
    ("pieces", "text", "stop"),
    [
        (["END", "xy", "END", "z"], "ENDxy", "END"),
        (["aEN", "D", "z"], "aENDz", None),
        (["abEN", "D", "z"], "ab", "END"),
        (["ENEN", "D", "z"], "EN", "END"),
        (["aENDy"], "aENDy", None),  # held back for the longer one, END is still none
        (["aENDED", "z"], "a", "ENDED"),
        (["aENDENDz"], "aEND", "END"),
    ],
)
def test_no_stop_string_ends_an_answer_before_min_tokens(
    pieces: list[str], text: str, stop: str | None
) -> None:
    """As in vLLM: one counts whose last token is behind the first min_tokens."""
    answers = Answers(request(stop=["END", "ENDED"], min_tokens=4, max_tokens=16), Letters)
    reasons = []
    found = ""
    for piece in pieces:
        delta = answers.feed([TokenEvent("r", 0, tuple(map(ord, piece)))])
        if delta is not None:
            found += delta.completions[0].text
            reasons.append(delta.completions[0].stop_reason)
    if not answers.finished:
        found += feed(answers, "", finish="length")
    assert (found, reasons[-1]) == (text, stop)


def test_the_stop_token_is_reported_but_has_no_text() -> None:
    answers = Answers(request(), Letters)
    delta = answers.feed([TokenEvent("r", 0, (97, 98), finish_reason="stop")])
    assert delta is not None
    assert delta.completions[0].text == "a"
    assert delta.completions[0].token_ids == (97, 98)


def test_answers_of_one_request_end_one_by_one() -> None:
    answers = Answers(request(n=2, stop="!"), Letters)
    assert feed(answers, "a!", index=1) == "a"
    assert not answers.finished
    assert answers.abandoned == [1]
    assert feed(answers, "b", index=0, finish="length") == "b"
    assert answers.finished


def test_without_a_decoder_tokens_pass_without_text() -> None:
    answers = Answers(request(), None)
    delta = answers.feed([TokenEvent("r", 0, (5,), finish_reason="length")])
    assert delta is not None
    assert delta.completions[0].token_ids == (5,)
    assert delta.completions[0].text == ""


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_matching_by_pieces_equals_matching_the_whole(
    text: str, stops: list[str], piece: int
) -> None:
    matcher = StopMatcher(tuple(stops), include=False)
    released, matched = "", None
    for start in range(0, len(text), piece):
        part, matched = matcher.push(text[start : start + piece])
        released += part
        if matched:
            break
    else:
        released += matcher.flush()
    if matched is None:
        assert released == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(released + matched)
        # Nothing released earlier held a stop string.
        assert not any(stop in released for stop in stops)


@pytest.mark.parametrize("stop", [[""], ["ok", ""]])
def test_an_empty_stop_string_is_refused(stop: list[str]) -> None:
    with pytest.raises(Exception, match="stop"):
        SamplingParams(stop=stop)


class Bytes:
    """Token ids are bytes of UTF-8, the last ones of which may be missing."""

    def __init__(self) -> None:
        self.held = b""

    def push(self, token_ids: tuple[int, ...]) -> str:
        text, used = codecs.utf_8_decode(self.held + bytes(token_ids), "replace", False)
        self.held = (self.held + bytes(token_ids))[used:]
        return text

    def flush(self) -> str:
        held, self.held = self.held, b""
        return held.decode(errors="replace")


@given(
    # Without the first letter of the stop string below: that would be held back at the end.
    text=st.text(st.characters(codec="utf-8", exclude_characters="n"), max_size=12),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    reason=st.sampled_from([None, "stop", "length", "error"]),
    after=st.integers(0, 2),
)
def test_several_steps_at_once_are_what_they_are_one_by_one(
    text: str, cuts: list[int], reason: str | None, after: int
) -> None:
    """Also in the short way of requests that want nothing but text."""
    ids = tuple(text.encode())
    events = [TokenEvent("r", 0, ids[:1], num_cached_tokens=2, started=7.0)]
    events += [TokenEvent("r", 0, (one,)) for one in ids[1:]]
    if reason is not None:
        events.append(
            TokenEvent("r", 0, (65, 0), finish_reason=reason, stop_reason=0, error="e")  # type: ignore[arg-type]
        )
        events += [TokenEvent("r", 0, (66,))] * after  # the engine didn't know yet

    def through(batches: list[list[TokenEvent]], **params: object) -> object:
        answers = Answers(request(**params), Bytes)
        deltas = [delta for batch in batches if (delta := answers.feed(batch)) is not None]
        return merge(deltas) if deltas else None

    batches, begin = [], 0
    while begin < len(events):
        end = begin + cuts[begin % len(cuts)]
        batches.append(events[begin:end])
        begin = end
    one_by_one = through([[event] for event in events])
    assert through(batches) == one_by_one
    # Looking for a stop string that never comes takes the long way.
    assert through([[event] for event in events], stop="no such text") == one_by_one


def test_deltas_that_waited_become_one() -> None:
    token = TokenLogprob(1, -0.5, 1, ())
    first = RequestDelta(
        "r",
        (CompletionDelta(1, "b", (2,), (token,)),),
        3,
        num_cached_tokens=2,
        prompt_logprobs=(None, token),
        started=1.0,
    )
    second = RequestDelta("r", (CompletionDelta(0, "a", (1,), (token,)),), 3)
    third = RequestDelta(
        "r",
        (
            CompletionDelta(0, "", (), (), "length"),
            CompletionDelta(1, "c", (3, 4), (token, token), "stop", 4),
        ),
        3,
        finished=True,
    )
    assert merge([first, second, third]) == RequestDelta(
        "r",
        (
            CompletionDelta(0, "a", (1,), (token,), "length"),
            CompletionDelta(1, "bc", (2, 3, 4), (token, token, token), "stop", 4),
        ),
        3,
        num_cached_tokens=2,
        prompt_logprobs=(None, token),
        finished=True,
        started=1.0,
    )
