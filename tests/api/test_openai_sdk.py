"""The official SDK against `halyard serve`: a real process, a real port, the model that ships."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest
from serve_process import ServeProcess

MODEL = "embedded"
CHAT: list[dict[str, str]] = [{"role": "user", "content": "What does textwrap.dedent do?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ServeProcess("--kv-blocks", "256", "--host-kv-blocks", "0", "--max-num-sequences", "8")
    try:
        server.wait_for("Ready:")
        yield server.url
    finally:
        status = server.stop()
    assert status == 0
    assert "Traceback" not in server.stderr


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120
    ) as client:
        yield client


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).owned_by == "halyard"


def test_streamed_text_equals_whole_text(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model=MODEL, prompt="import ", max_tokens=8, temperature=0)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8
    assert whole.choices[0].finish_reason in ("length", "stop")
    with sdk.completions.create(
        model=MODEL, prompt="import ", max_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_whole_and_streamed(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=8, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    best = choice.logprobs.content[0]
    assert best.token == best.top_logprobs[0].token  # greedy
    assert best.logprob == pytest.approx(best.top_logprobs[0].logprob)
    with sdk.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=8, temperature=0, stream=True
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_n_answers_with_a_seed_are_reproducible(sdk: openai.OpenAI) -> None:
    def ask() -> list[str]:
        answer = sdk.completions.create(
            model=MODEL, prompt="class ", max_tokens=6, n=3, seed=7, temperature=1.0
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(first) == 3
    assert len(set(first)) > 1
    assert ask() == first


def test_a_stop_string_ends_the_answer(sdk: openai.OpenAI) -> None:
    full = sdk.completions.create(model=MODEL, prompt="def ", max_tokens=8, temperature=0)
    stop = full.choices[0].text.strip()[2:4]
    cut = sdk.completions.create(model=MODEL, prompt="def ", max_tokens=8, temperature=0, stop=stop)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == full.choices[0].text.split(stop)[0]


def test_the_likelihood_of_a_prompt(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(
        model=MODEL, prompt="import os\n", max_tokens=0, echo=True, logprobs=1
    )
    assert answer.choices[0].text == "import os\n"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "import os\n"
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:] if value is not None)


def test_errors_are_the_sdk_s_own(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        sdk.completions.create(model=MODEL, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"


def test_async_requests_run_side_by_side(url: str) -> None:
    async def ask() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", timeout=120) as client:

            async def one() -> str:
                answer = await client.completions.create(
                    model=MODEL, prompt="import ", max_tokens=6, temperature=0
                )
                return answer.choices[0].text

            many = await asyncio.gather(*(one() for _ in range(6)))
            text = ""
            stream = await client.completions.create(
                model=MODEL, prompt="import ", max_tokens=6, temperature=0, stream=True
            )
            async for chunk in stream:
                text += chunk.choices[0].text
            return many, text

    many, streamed = asyncio.run(ask())
    assert set(many) == {streamed}


def test_a_dropped_stream_gives_its_blocks_back(sdk: openai.OpenAI, url: str) -> None:
    stream = sdk.completions.create(
        model=MODEL, prompt="x", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    for _ in range(200):
        status = httpx.get(f"{url}/status").json()
        if status["kv_blocks_used"] == 0 and status["running"] == 0:
            return
    pytest.fail(f"still running: {status}")
