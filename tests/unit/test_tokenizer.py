"""Tokenizers of both kinds: byte-level BPE, and word pieces with spaces and single bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halyard.hal.errors import ModelError, RequestError
from halyard.models.byte_level import ByteDetokenizer
from halyard.models.detokenizer import Detokenizer
from halyard.models.source import ModelSource
from halyard.models.tokenizer import Tokenizer, load_tokenizer

CORPUS = ["def f(x): return x + 1  # größer 猫 🙂", "the cat sat on the mat, the cat sat"] * 4


def byte_level() -> Inner:
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=alphabet,
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    return inner


def word_pieces() -> Inner:
    """As Llama 2's: "▁" for a space, a token for every byte, the first space is no text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefst", "▁t", "▁c", "at", "▁cat", "▁the", "猫"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    inner = Inner(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner


def wrap(inner: Inner, **options: Any) -> Tokenizer:
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options
        )
    )


BYTES = wrap(byte_level())
WORDS = wrap(word_pieces(), unk_token="<unk>")
FIRST_BYTE = 3  # id of <0x00> in WORDS


def streamed(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush()]


@given(ids=st.lists(st.integers(0, 329), max_size=120), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_ids_of_byte_level_vocabularies(ids: list[int], skip: bool) -> None:
    """Exactly the whole decode: broken bytes, special tokens and all."""
    ids = [token % BYTES.vocab_size for token in ids]
    assert "".join(streamed(BYTES, ids, skip)) == BYTES.decode(ids, skip)


@given(ids=st.lists(st.integers(FIRST_BYTE + 256, WORDS.vocab_size - 1), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_word_pieces(ids: list[int]) -> None:
    assert "".join(streamed(WORDS, ids)) == WORDS.decode(ids)


@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_through_single_bytes(text: str) -> None:
    ids = WORDS.encode(text)
    found = streamed(WORDS, ids)
    assert "".join(found) == WORDS.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in found)


def test_a_character_of_four_byte_tokens_comes_at_once() -> None:
    ids = [FIRST_BYTE + byte for byte in "🙂".encode()]
    assert streamed(WORDS, ids) == ["", "", "", "🙂", ""]


def test_a_character_after_broken_bytes_is_whole() -> None:
    """More broken bytes than any character has must not cut the one that follows."""
    table = {BYTES.token_bytes(token): token for token in range(BYTES.vocab_size)}
    for broken in (1, 7, 31, 40, 100):
        ids = [table[b"\xff"]] * broken + [table[bytes([byte])] for byte in "🙂".encode()]
        found = streamed(BYTES, ids)
        assert "".join(found) == "\ufffd" * broken + "🙂"


@pytest.mark.parametrize("token", [1, FIRST_BYTE + 255], ids=["no text", "broken bytes"])
@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["byte level", "word pieces"])
def test_the_price_stays_flat(tokenizer: Tokenizer, token: int) -> None:
    """An answer of nothing but skipped or broken tokens must not cost more and more a token."""
    seen: list[int] = []

    def decode(ids: list[int]) -> str:
        seen.append(len(ids))
        return tokenizer.decode(ids)

    detokenizer = Detokenizer(decode)
    for _ in range(2000):
        detokenizer.push([token])
    assert max(seen) < 150


def test_bytes_need_no_window() -> None:
    """Byte-level vocabularies have a decoder that keeps less than a character."""
    detokenizer = BYTES.detokenizer()
    assert isinstance(detokenizer, ByteDetokenizer)
    assert isinstance(WORDS.detokenizer(), Detokenizer)
    (first, *rest) = (BYTES.token_bytes(token) for token in range(BYTES.vocab_size))
    assert first == b"<s>"
    half = rest.index("🙂".encode()[:1]) + 1
    for _ in range(100):
        detokenizer.push([half])
    assert len(detokenizer._held) == 1


@given(
    ids=st.lists(st.integers(0, 345), max_size=120),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    skip=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_tokens_that_come_several_at_once_are_the_same_text(
    ids: list[int], cuts: list[int], skip: bool
) -> None:
    """A server that is late hands on several steps' tokens as one; ids beyond the vocabulary too."""
    for tokenizer in (BYTES, WORDS):
        one_by_one = "".join(streamed(tokenizer, ids, skip))
        detokenizer, text, begin = tokenizer.detokenizer(skip), "", 0
        while begin < len(ids):
            end = begin + cuts[begin % len(cuts)]
            text, begin = text + detokenizer.push(ids[begin:end]), end
        assert text + detokenizer.flush() == one_by_one


def test_added_tokens_are_written_as_they_are() -> None:
    inner = byte_level()
    inner.add_tokens(["a b", "Ġx", "<tool>"])
    inner.add_special_tokens(["<end of it>"])
    tokenizer = wrap(inner)
    ids = tokenizer.encode("cat a b <tool>Ġx🙂<end of it>the</s>")
    for skip in (True, False):
        for repeated in (ids, ids[::-1]):
            assert "".join(streamed(tokenizer, repeated, skip)) == tokenizer._inner.decode(
                repeated, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_bytes_of_a_token() -> None:
    assert WORDS.token_bytes(FIRST_BYTE + 0xE7) == b"\xe7"
    text = "größer 猫"
    assert b"".join(map(BYTES.token_bytes, BYTES.encode(text))) == text.encode()
    assert BYTES.token_bytes(1) == b"</s>"
    assert BYTES.token_bytes(10**6) == b""


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [0, *BYTES.encode("cat", add_special_tokens=False), 1]
    assert BYTES.decode(ids) == "cat"
    assert BYTES.decode(ids, skip_special_tokens=False) == "<s>cat</s>"
    assert "".join(streamed(BYTES, ids, skip=False)) == "<s>cat</s>"
    assert BYTES.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages[7]['content'] + 'x' }}", "refuses"),
        ("{{ 1 // (messages | length - 1) }}", "refuses"),
        ("{% if %}", "refuses"),
    ],
)
def test_templates_that_cannot_render(template: str | None, reason: str) -> None:
    tokenizer = wrap(byte_level(), chat_template=template)
    with pytest.raises(RequestError, match=reason) as error:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert error.value.param == "messages"
    assert "\n" not in str(error.value)


def test_a_template_cannot_reach_python() -> None:
    """Templates come with checkpoints, which nobody has read: they run in jinja's sandbox."""
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="refuses"):
        wrap(byte_level(), chat_template=template).apply_chat_template(
            [{"role": "user", "content": "hi"}]
        )


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_loading(tokenizer_class: str, tmp_path: Path) -> None:
    inner = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>"
    )
    inner.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"tokenizer_class": tokenizer_class})
    )
    tokenizer = load_tokenizer(ModelSource("m", tmp_path, "path"))
    assert tokenizer is not None
    assert tokenizer.vocab_size == BYTES.vocab_size
    assert tokenizer.has_chat_template is False


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="can't read the tokenizer of m"):
        load_tokenizer(ModelSource("m", tmp_path, "path"))
