"""Every parameter: honoured, ignored without a difference, or refused by its name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_engine import LetterTokenizer
from served import Served

from halyard.api.parameters import IGNORED, REFUSED, refused_names
from halyard.api.schemas.chat import ChatCompletionRequest
from halyard.api.schemas.completions import CompletionRequest

HI = [{"role": "user", "content": "hi"}]
VALUES: dict[str, Any] = {
    "length_penalty": 2.0,
    "bad_words": ["x"],
    "allowed_token_ids": [5],
    "functions": [{"name": "f"}],
    "prediction": {"type": "content", "content": "x"},
    "metadata": {"a": "b"},
    "store": True,
    "use_beam_search": True,
    "spaces_between_special_tokens": False,
    "documents": [{"a": 1}],
    "web_search_options": {"a": 1},
    "audio": {"voice": "x"},
    "logits_processors": ["x"],
}
ENDPOINTS = [
    ("/v1/completions", CompletionRequest, {"prompt": "hi"}),
    ("/v1/chat/completions", ChatCompletionRequest, {"messages": HI}),
]


def cases(names: Any, of: Any = lambda kind: kind.__struct_fields__) -> list[Any]:
    return [
        pytest.param(path, body, name, id=f"{path}-{name}")
        for path, kind, body in ENDPOINTS
        for name in names
        if name in of(kind)
    ]


@pytest.mark.parametrize(("path", "body", "name"), cases(REFUSED, refused_names))
def test_refused_by_name(served: Served, path: str, body: Any, name: str) -> None:
    answer = served.post(path, **body, **{name: VALUES.get(name, "some")})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    for harmless in (None, *REFUSED[name][0]):
        assert served.post(path, **body, **{name: harmless}).status_code == 200


@pytest.mark.parametrize(("path", "body", "name"), cases(IGNORED))
def test_ignored_without_a_difference(served: Served, path: str, body: Any, name: str) -> None:
    plain = served.post(path, **body).json()["choices"]
    assert served.post(path, **body, **{name: VALUES.get(name, "x")}).json()["choices"] == plain


def test_unknown_parameters_are_ignored(served: Served) -> None:
    assert served.post("/v1/completions", prompt="x", nobody_knows=1).status_code == 200


def test_only_the_end_of_the_prompt(served: Served) -> None:
    answer = served.post(
        "/v1/completions", prompt="abcdef", echo=False, truncate_prompt_tokens=2,
        return_token_ids=True,
    ).json()  # fmt: skip
    assert answer["choices"][0]["prompt_token_ids"] == [ord("e"), ord("f")]
    assert answer["usage"]["prompt_tokens"] == 2


def test_the_best_of_several(served: Served) -> None:
    answer = served.post("/v1/completions", prompt="x", best_of=3, n=2, max_tokens=4).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 12  # all three were made


def test_the_texts_of_tokens_are_made_beside_the_event_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body of 32 MiB has millions of them: all streams would stand still for half a minute."""
    threads: list[str] = []

    def token_text(self: LetterTokenizer, token_id: int) -> str:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            threads.append("beside")
        else:
            threads.append("on the loop")
        return chr(token_id)

    monkeypatch.setattr(LetterTokenizer, "token_text", token_text)
    assert served.post("/tokenize", prompt="abc").json()["token_strs"] is None
    assert threads == []  # nobody asked for them
    answer = served.post("/tokenize", prompt="abc", return_token_strs=True).json()
    assert answer["token_strs"] == ["a", "b", "c"]
    assert set(threads) == {"beside"}


def test_tokens_of_a_text_and_back(served: Served) -> None:
    answer = served.post("/tokenize", prompt="hö", return_token_strs=True).json()
    assert answer == {
        "count": 2, "max_model_len": 256, "tokens": [104, 246], "token_strs": ["h", "ö"]
    }  # fmt: skip
    assert served.post("/detokenize", tokens=[104, 246]).json() == {"prompt": "hö"}


def test_tokens_of_a_conversation(served: Served) -> None:
    tokens = served.post("/tokenize", messages=HI).json()["tokens"]
    assert "".join(map(chr, tokens)) == "user: hi\nassistant: "
    short = served.post("/tokenize", messages=HI, add_generation_prompt=False).json()["tokens"]
    assert "".join(map(chr, short)) == "user: hi\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_token_requests(served: Served, path: str, body: Any, param: str) -> None:
    answer = served.post(path, **body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
