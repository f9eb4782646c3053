"""Chat and streaming in the terminal, over the null backend with a toy tokenizer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from halyard.api.cli.local_stream import Interrupt, stream_answer
from halyard.hal.errors import RequestError
from halyard.models.shapes import shape_config
from halyard.runtime.llm import LLM
from halyard.runtime.request import SamplingParams


class ToyDetokenizer:
    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in token_ids)

    def flush(self) -> str:
        return ""


class ToyTokenizer:
    has_chat_template = True

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return [1 + len(message["content"]) for message in messages]

    def detokenizer(self, skip_special_tokens: bool = True) -> ToyDetokenizer:
        return ToyDetokenizer()


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(
        shape_config("160m"),
        backend="null",
        load_format="dummy",
        max_model_len=256,
        kv_blocks=64,
        host_kv_blocks=0,
    ) as made:
        yield made


PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_stream_brings_every_token(llm: LLM) -> None:
    with Interrupt() as interrupt:
        deltas = list(stream_answer(llm.engine, ToyTokenizer(), [1, 2], PARAMS, interrupt))  # type: ignore[arg-type]
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert len(tokens) == 8
    assert "".join(delta.text for delta in deltas) == "".join(f"<{token}>" for token in tokens)
    assert deltas[-1].finish_reason == "length"


def test_ctrl_c_ends_the_answer_and_the_engine_goes_on(llm: LLM) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        seen = 0
        for _ in stream_answer(llm.engine, ToyTokenizer(), [1, 2], PARAMS, interrupt):  # type: ignore[arg-type]
            seen += 1
            if seen == 2:
                os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.pressed
    assert seen == 2
    assert signal.getsignal(signal.SIGINT) is before
    assert not llm.engine.has_work()
    assert llm.engine.stats().scheduler.blocks_used == 0
    test_stream_brings_every_token(llm)


def test_no_tokenizer_is_an_error(llm: LLM) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        list(stream_answer(llm.engine, None, [1], PARAMS, Interrupt()))


def test_chat_loop(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_module = pytest.importorskip("halyard.api.cli.chat", exc_type=ImportError)
    lines: list[str | BaseException] = [
        "hello", "/clear", "again", "/help", KeyboardInterrupt(), "", EOFError(),
    ]  # fmt: skip

    def read(_prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    chat = chat_module.Chat(llm.engine, ToyTokenizer(), PARAMS, "be brief")
    chat.loop()
    assert lines == []
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[1]["content"] == "again"
    assert chat.messages[2]["content"].count("<") == 8
    assert "(forgotten)" in capsys.readouterr().out


def test_chat_survives_a_full_context(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    chat_module = pytest.importorskip("halyard.api.cli.chat", exc_type=ImportError)
    chat = chat_module.Chat(llm.engine, ToyTokenizer(), PARAMS, None)
    chat.messages = [{"role": "user", "content": "x"}] * 300
    chat.answer("y")
    assert "/clear" in capsys.readouterr().out
    assert len(chat.messages) == 300
