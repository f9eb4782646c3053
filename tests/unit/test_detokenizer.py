"""Text comes piece by piece, never half a character, and adds up to the whole."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from halyard.hal.errors import RequestError
from halyard.models.byte_level import BytePieces, byte_level_alphabet
from halyard.models.detokenizer import Detokenizer
from halyard.models.source import resolve_source
from halyard.models.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(resolve_source("embedded"))
assert TOKENIZER is not None


def pieces(ids: list[int]) -> list[str]:
    detokenizer = TOKENIZER.detokenizer()
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush()]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    found = pieces(ids)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found) or "\ufffd" in text


@given(st.lists(st.integers(5, 4095), max_size=60))
@settings(max_examples=150, deadline=None)
def test_random_ids_add_up_to_the_whole_decode(ids: list[int]) -> None:
    assert "".join(pieces(ids)).replace("\ufffd", "") == TOKENIZER.decode(ids).replace("\ufffd", "")


def test_half_a_character_is_held_back() -> None:
    ids = TOKENIZER.encode("a🙂b")
    found = pieces(ids)
    assert [piece for piece in found if piece] == ["a", "🙂", "b"]


def test_what_never_becomes_a_character_is_released_at_the_end() -> None:
    ids = TOKENIZER.encode("🙂")[:-1]
    assert "".join(pieces(ids)).startswith("\ufffd")


def test_leading_spaces_of_word_pieces() -> None:
    """Sentencepiece-like vocabularies drop the first space only at the very start."""
    words = {"▁the": 0, "▁cat": 1, "▁sat": 2, "s": 3, "<unk>": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    generator = random.Random(0)
    for _ in range(20):
        ids = [generator.randrange(4) for _ in range(30)]
        detokenizer = Detokenizer(lambda chosen: inner.decode(chosen))
        text = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
        assert text == inner.decode(ids)


def test_the_price_of_a_token_does_not_grow() -> None:
    seen: list[int] = []

    def decode(ids: list[int]) -> str:
        seen.append(len(ids))
        return "x" * len(ids)

    detokenizer = Detokenizer(decode)
    for token in range(5000):
        detokenizer.push([token])
    assert max(seen) < 40


def test_bytes_of_tokens() -> None:
    text = "def f():\n    return '🙂'"
    assert b"".join(map(TOKENIZER.token_bytes, TOKENIZER.encode(text))) == text.encode()


def test_chat_template() -> None:
    ids = TOKENIZER.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == (
        "<|user|>\nHello<|end|>\n<|assistant|>\n"
    )
    with pytest.raises(RequestError, match="roles are"):
        TOKENIZER.apply_chat_template([{"role": "wizard", "content": "Hello"}])
    with pytest.raises(RequestError, match="empty"):
        TOKENIZER.apply_chat_template([])


def test_a_word_is_its_bytes_or_what_is_written() -> None:
    """Whatever its characters: those that stand for bytes, and words with any other."""
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    rng = random.Random(3)
    others = [" ", "\n", "\xa0", "\x85", "\u0144", "\u4e2d", "\U0001f600"]
    words: list[str | None] = [None, "<pad>", ""]
    for _ in range(500):
        word = rng.choices(list(alphabet), k=rng.randrange(9))
        words += ["".join(word), "".join([*word, rng.choice(others)])]
    found = BytePieces(words.__getitem__, frozenset({"<pad>"}))
    for number, one in enumerate(words):
        if one is None or one == "<pad>":
            assert found[number] == b""
        elif all(char in alphabet for char in one):
            assert found[number] == bytes(alphabet[char] for char in one)
        else:
            assert found[number] == one.encode()
