"""POST /v1/embeddings on a real port: forms of input and output, what is refused, what is freed."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from live_server import LiveServer, live_server

from halyard.api.embedding_run import MAX_INPUTS
from halyard.api.keys import KeyRing, create_key, edit_keys
from halyard.api.tenancy import Tenancy
from halyard.api.tenants import Tenant

SIZE = 320  # hidden states of the model that ships


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with live_server("cpu-eager") as server:
        yield server


@pytest.fixture(scope="module")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, given: Any, **options: Any) -> dict[str, Any]:
    answer = http.post("/v1/embeddings", json={"input": given, **options})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def vectors(body: dict[str, Any]) -> np.ndarray:
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    return np.array([item["embedding"] for item in body["data"]])


def test_the_official_sdk(live: LiveServer) -> None:
    """It asks for base64 unless told otherwise and decodes it itself."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as sdk:
        found = sdk.embeddings.create(model="embedded", input=["import os", "def f(x):"])
        plain = sdk.embeddings.create(
            model="embedded", input=["import os", "def f(x):"], encoding_format="float"
        )
        short = sdk.embeddings.create(model="embedded", input="import os", dimensions=8)
    assert [item.index for item in found.data] == [0, 1]
    for item, other in zip(found.data, plain.data, strict=True):
        assert len(item.embedding) == SIZE
        assert np.linalg.norm(item.embedding) == pytest.approx(1, abs=1e-5)
        # A request's inputs are computed together or apart, as they come in: fp32 in another order.
        np.testing.assert_allclose(item.embedding, other.embedding, atol=1e-6)
    head = np.array(found.data[0].embedding[:8])
    np.testing.assert_allclose(short.data[0].embedding, head / np.linalg.norm(head), atol=1e-6)
    assert found.object == "list"
    assert found.usage.prompt_tokens == found.usage.total_tokens > 2


def test_every_form_of_input(live: LiveServer, http: httpx.Client) -> None:
    texts = ["import os", "def f(x):\n    return"]
    ids = [live.plain.encode(text) for text in texts]
    by_text, by_ids = ask(http, texts), ask(http, ids)
    np.testing.assert_allclose(vectors(by_text), vectors(by_ids), atol=1e-6)
    assert (
        by_text["usage"]["prompt_tokens"] == sum(map(len, ids)) == by_ids["usage"]["total_tokens"]
    )
    for text, own, row in zip(texts, ids, vectors(by_text), strict=True):
        np.testing.assert_allclose(vectors(ask(http, text))[0], row, atol=1e-6)
        np.testing.assert_allclose(vectors(ask(http, own))[0], row, atol=1e-6)


def test_base64_is_float32(http: httpx.Client) -> None:
    plain = vectors(ask(http, "import os"))[0]
    coded = ask(http, "import os", encoding_format="base64")["data"][0]["embedding"]
    found = np.frombuffer(base64.b64decode(coded), "<f4")
    np.testing.assert_allclose(found, plain, atol=1e-7)


def test_pooling_and_length(http: httpx.Client) -> None:
    last, mean = (vectors(ask(http, "import os", pooling=how))[0] for how in ("last", "mean"))
    np.testing.assert_allclose(vectors(ask(http, "import os"))[0], last, atol=1e-7)
    assert abs(last - mean).max() > 1e-3
    raw = vectors(ask(http, "import os", normalize=False))[0]
    assert abs(np.linalg.norm(raw) - 1) > 1e-3
    np.testing.assert_allclose(raw / np.linalg.norm(raw), last, atol=1e-6)


def test_the_last_tokens_of_a_long_text(live: LiveServer, http: httpx.Client) -> None:
    long = list(range(300, 300 + 900)) * 2
    most = live.client.max_model_len
    assert len(long) > most
    refused = http.post("/v1/embeddings", json={"input": [[300], long]})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert error["message"].startswith(
        "input 1: this model's maximum context length is 1024 tokens"
    )
    cut = ask(http, long, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == most  # the whole context: nothing is generated
    np.testing.assert_allclose(vectors(cut), vectors(ask(http, long[-most:])), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["x", ""]}, "input"),
        ({"input": ["x", 5]}, "input"),
        ({"input": [[1], "x"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": None}, "input"),
        ({"input": ["x"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": SIZE + 1}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "x", "model": "other"}, "model"),
    ],
)
def test_refused(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert answer.json()["error"]["param"] == param


def test_many_inputs_in_bounded_company(live: LiveServer, http: httpx.Client) -> None:
    texts = [f"x = {number}\n" for number in range(150)]
    body = ask(http, texts)
    rows = vectors(body)
    assert rows.shape == (150, SIZE)
    for number in (0, 77, 149):
        np.testing.assert_allclose(rows[number], vectors(ask(http, texts[number]))[0], atol=1e-5)


def test_many_requests_at_once_are_all_answered() -> None:
    """More inputs than the queue takes: each request is answered whole or refused with a time to come
    again, one that comes again is answered in the end, and nothing stays behind."""
    inputs = [[300 + number, 301, 302] for number in range(40)]
    engine = {"max_queue_len": 48, "max_num_sequences": 4}
    statuses: Counter[int] = Counter()

    async def once(http: httpx.AsyncClient, number: int) -> None:
        while True:
            answer = await http.post("/v1/embeddings", json={"input": inputs[: 1 + number % 40]})
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                assert len(answer.json()["data"]) == 1 + number % 40
                return
            assert answer.json()["error"]["code"] == "queue_full", answer.text
            assert int(answer.headers["retry-after"]) >= 1
            await asyncio.sleep(0.05 * (1 + number % 7))  # sooner than told

    async def all_at_once(url: str) -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            async with asyncio.timeout(60):
                await asyncio.gather(*(once(http, number) for number in range(100)))

    with live_server("null", engine=engine) as live:
        asyncio.run(all_at_once(live.url))
        deadline = time.monotonic() + 10
        while live.client.stats().scheduler.blocks_used or live.client.num_requests:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert statuses[200] == 100
    assert set(statuses) == {200, 429}, statuses  # some were refused first


def test_whoever_goes_away_leaves_nothing(live: LiveServer) -> None:
    inputs = [list(range(300, 1100)) for _ in range(400)]
    with (
        httpx.Client(base_url=live.url, timeout=0.3) as impatient,
        pytest.raises(httpx.TimeoutException),
    ):
        impatient.post("/v1/embeddings", content=json.dumps({"input": inputs, "pooling": "mean"}))
    deadline = time.monotonic() + 10
    while live.client.stats().scheduler.blocks_used or live.client.num_requests:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_batch_of_embeddings(live: LiveServer, http: httpx.Client) -> None:
    line = {
        "custom_id": "a", "method": "POST", "url": "/v1/embeddings",
        "body": {"model": "embedded", "input": "import os"},
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as sdk:
        file = sdk.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = sdk.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        deadline = time.monotonic() + 20
        while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
            time.sleep(0.05)
            batch = sdk.batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        answer = json.loads(sdk.files.content(batch.output_file_id).text)
    np.testing.assert_allclose(
        vectors(answer["response"]["body"]), vectors(ask(http, "import os")), atol=1e-6
    )


def test_a_tenants_limits_hold_for_embeddings_too(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    limits: dict[str, dict[str, Any]] = {
        "few": {"tokens_per_minute": 30}, "once": {"requests_per_minute": 1},
        "elsewhere": {"models": ("other",)}, "short": {"max_context": 4},
    }  # fmt: skip
    with edit_keys(path) as content:
        for name, own in limits.items():
            content.tenants[name] = Tenant(name, **own)
        keys = {name: create_key(content, name) for name in limits}

    def ask_as(name: str | None, count: int) -> httpx.Response:
        headers = {"authorization": f"Bearer {keys[name]}"} if name else {}
        body = {"input": list(range(300, 300 + count))}
        return http.post("/v1/embeddings", json=body, headers=headers)

    def refused(answer: httpx.Response, status: int) -> str:
        assert answer.status_code == status, answer.text
        return str(answer.json()["error"]["code"])

    with (
        live_server("null", tenancy=Tenancy(KeyRing(path), None, None)) as live,
        httpx.Client(base_url=live.url, timeout=60) as http,
    ):
        assert refused(ask_as(None, 3), 401) == "invalid_api_key"
        assert refused(ask_as("elsewhere", 3), 403) == "permission_denied"
        assert refused(ask_as("short", 5), 400) == "context_length_exceeded"
        assert ask_as("short", 4).status_code == 200
        assert ask_as("once", 3).status_code == 200
        again = ask_as("once", 3)
        assert refused(again, 429) == "rate_limit_exceeded"
        assert 1 <= int(again.headers["retry-after"]) <= 60
        assert ask_as("few", 20).headers["x-ratelimit-remaining-tokens"] == "10"
        more = ask_as("few", 20)
        assert refused(more, 429) == "rate_limit_exceeded"
        assert 1 <= int(more.headers["retry-after"]) <= 60
        headers = {"authorization": f"Bearer {keys['few']}"}
        (used,) = http.get("/v1/usage", headers=headers).json()["data"]
        assert (used["requests"], used["refused"], used["prompt_tokens"]) == (1, 1, 20)
