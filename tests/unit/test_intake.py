"""Token ids of a prompt: what they become, what is refused in one line, what crosses processes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from halyard.hal.errors import RequestError
from halyard.runtime.intake import Intake, Limits, TokenIds
from halyard.runtime.request import SamplingParams


@pytest.fixture
def intake() -> Intake:
    limits = Limits(vocab_size=100, max_model_len=8, eos_token_ids=frozenset(), max_num_sequences=4)
    return Intake(limits)


@pytest.mark.parametrize(
    "given",
    [
        [2, 3, 99],
        (0, 1),
        np.array([5, 6]),
        np.array([90, 90, 90], np.uint8),
        bytes([7, 8]),
        range(3),
    ],
)
def test_integers_of_any_kind_become_ints(intake: Intake, given: Any) -> None:
    prompt, packed = intake.checked_prompt(given, 0, "prompt")
    assert prompt == tuple(int(token) for token in given)
    assert {type(token) for token in prompt} == {int}
    assert np.frombuffer(packed, np.int64).tolist() == list(prompt)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "empty"),
        ([5, True], "must be integers"),
        ([False], "must be integers"),
        ([5, 6.0], "must be integers"),
        (["5"], "must be integers"),
        ([5, None], "must be integers"),
        ([5, -1], "outside the vocabulary"),
        ([100], "outside the vocabulary"),
        ([5, 1 << 70], "outside the vocabulary"),
        (range(9), "context length"),
    ],
)
def test_what_is_no_token_is_refused_in_one_line(intake: Intake, given: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        intake.checked_prompt(given, 0, "prompt")
    assert "\n" not in str(caught.value)
    assert caught.value.param == "prompt"


def test_token_ids_of_a_parser_are_the_same_prompt_and_refused_alike(intake: Intake) -> None:
    for ids in ([2, 3, 99], [0]):
        known = TokenIds.of(ids)
        assert known == ids
        assert intake.checked_prompt(known, 0, "prompt") == intake.checked_prompt(ids, 0, "prompt")
    for wrong in ([5, -1], [100], [5, 1 << 62], list(range(9)), []):
        told = []
        for given in (wrong, TokenIds.of(wrong)):
            assert given is not None
            with pytest.raises(RequestError) as caught:
                intake.checked_prompt(given, 0, "prompt")
            told.append(str(caught.value))
        assert told[0] == told[1]
    for other in ([5, 1 << 70], ["5"], [5, [6]], [5, 6.0]):
        assert TokenIds.of(other) is None


def test_a_request_crosses_processes_whole(intake: Intake) -> None:
    params = SamplingParams(3, 0.5, 0.25, 1.5, 0.5, 0.75, 7, 0.1, 9, ("x",), (4,), True, 4, 2, 1, 0)
    made = intake.request([1, 2], params, tenant="a", priority=3, cache_salt="s", share=2.0)
    there = pickle.loads(pickle.dumps(made))
    assert there == made
    assert there.params == params
    assert there.prompt_token_ids == (1, 2)
    assert there.packed == made.packed == np.array([1, 2]).tobytes()
    bare = replace(made, packed=b"")
    assert pickle.loads(pickle.dumps(bare)) == made
    wide = Intake(Limits(1 << 17, 4096, frozenset(), 4))
    long = wide.request([60000 + n for n in range(2000)], params)
    assert len(pickle.dumps(long)) < 2000 * 8 + 1000  # the prompt once
    assert (there.seed, there.stop_token_ids) == (9, frozenset({4}))
