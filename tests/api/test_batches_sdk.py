"""Files and batches through the openai client; a batch that a stop cut off goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the openai client")

import openai
from scripted_engine import ScriptedEngine
from served import Served


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0, timeout=20
    )


def requests(count: int, **body: Any) -> bytes:
    return "".join(
        json.dumps({"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions",
                    "body": {"prompt": "x"} | body}) + "\n"
        for n in range(count)
    ).encode()  # fmt: skip


def upload(sdk: openai.OpenAI, content: bytes) -> str:
    return sdk.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch").id


def start(sdk: openai.OpenAI, file_id: str) -> str:
    return sdk.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
    ).id


def test_files(served: Served) -> None:
    with client(served) as sdk:
        file_id = upload(sdk, b"abc")
        assert sdk.files.retrieve(file_id).bytes == 3
        assert sdk.files.content(file_id).read() == b"abc"
        assert [file.id for file in sdk.files.list()] == [file_id]
        assert sdk.files.delete(file_id).deleted
        with pytest.raises(openai.NotFoundError):
            sdk.files.retrieve(file_id)
        with pytest.raises(openai.BadRequestError):
            sdk.files.create(file=("x", io.BytesIO(b"")), purpose="x")  # type: ignore[arg-type]


def test_a_batch(served: Served) -> None:
    with client(served) as sdk:
        batch_id = start(sdk, upload(sdk, requests(3, max_tokens=5)))
        assert served.until(lambda: sdk.batches.retrieve(batch_id).status == "completed")
        batch = sdk.batches.retrieve(batch_id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == batch.request_counts.total == 3
        assert batch.output_file_id is not None
        lines = sdk.files.content(batch.output_file_id).text.splitlines()
        texts = [json.loads(one)["response"]["body"]["choices"][0]["text"] for one in lines]
        assert texts == ["Hello"] * 3
        assert [one.id for one in sdk.batches.list()] == [batch_id]


def test_a_bad_file_fails_its_batch(served: Served) -> None:
    with client(served) as sdk:
        batch_id = start(sdk, upload(sdk, b"nonsense\n"))
        assert served.until(lambda: sdk.batches.retrieve(batch_id).status == "failed")
        errors = sdk.batches.retrieve(batch_id).errors
        assert errors is not None
        assert errors.data is not None
        assert "line 1 is not valid JSON" in (errors.data[0].message or "")
        with pytest.raises(openai.NotFoundError):
            start(sdk, "file-0")


def test_a_batch_is_cancelled(serve_engine: Callable[..., Served]) -> None:
    served = serve_engine(ScriptedEngine("x" * 200, pause=0.05))
    with client(served) as sdk:
        batch_id = start(sdk, upload(sdk, requests(2, max_tokens=200)))
        assert served.until(lambda: bool(served.engine.running))
        assert sdk.batches.cancel(batch_id).status == "cancelled"
        assert served.until(lambda: not served.engine.running)
        assert sdk.batches.retrieve(batch_id).status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            sdk.batches.cancel(batch_id)


def test_a_batch_goes_on_after_a_restart(
    serve_engine: Callable[..., Served], tmp_path: Path
) -> None:
    slow = serve_engine(ScriptedEngine("x" * 200, pause=0.05), data_dir=tmp_path)
    with client(slow) as sdk:
        batch_id = start(sdk, upload(sdk, requests(2, max_tokens=200)))
        assert slow.until(lambda: bool(slow.engine.running))
    slow.stop()
    fresh = serve_engine(ScriptedEngine("Hi"), data_dir=tmp_path)
    with client(fresh) as sdk:
        assert fresh.until(lambda: sdk.batches.retrieve(batch_id).status == "completed")


def test_lines_that_failed_before_a_restart_are_counted_so_after_it(
    serve_engine: Callable[..., Served], tmp_path: Path
) -> None:
    def counts(sdk: openai.OpenAI) -> tuple[int, int, int]:
        found = sdk.batches.retrieve(batch_id).request_counts
        assert found is not None
        return found.total, found.completed, found.failed

    slow = serve_engine(ScriptedEngine("x" * 200, pause=0.05), data_dir=tmp_path)
    refused = requests(1, temperature=-1).replace(b"r0", b"refused")
    with client(slow) as sdk:
        batch_id = start(sdk, upload(sdk, refused + requests(1, max_tokens=200)))
        assert slow.until(lambda: counts(sdk) == (2, 0, 1))
    slow.stop()
    fresh = serve_engine(ScriptedEngine("Hi"), data_dir=tmp_path)
    with client(fresh) as sdk:
        assert fresh.until(lambda: sdk.batches.retrieve(batch_id).status == "completed")
        assert counts(sdk) == (2, 1, 1)


@pytest.mark.parametrize("name", ["../../etc", "file-..", "batch_x", "%2e%2e"])
def test_ids_lead_nowhere_else(served: Served, name: str) -> None:
    assert served.http.get(f"/v1/files/{name}").status_code == 404
    assert served.http.get(f"/v1/batches/{name}").status_code == 404
