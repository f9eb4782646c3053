"""Lists come in pages: through the openai client, and with what it never sends."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("openai", reason="needs the openai client")

import openai
from served import Served


@pytest.fixture
def sdk(served: Served) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0, timeout=20
    )


def upload(sdk: openai.OpenAI, count: int, purpose: str = "batch") -> list[str]:
    return [
        sdk.files.create(file=(f"{n}", io.BytesIO(b"x")), purpose=purpose).id  # type: ignore[arg-type]
        for n in range(count)
    ]


def batches(sdk: openai.OpenAI, count: int) -> list[str]:
    (file_id,) = upload(sdk, 1)
    return [
        sdk.batches.create(
            input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
        ).id
        for _ in range(count)
    ]


def test_the_client_turns_the_pages(sdk: openai.OpenAI) -> None:
    made = upload(sdk, 7)
    first = sdk.files.list(limit=3)
    assert [one.id for one in first.data] == made[::-1][:3]
    assert first.has_more
    assert [one.id for one in first] == made[::-1]
    assert [one.id for one in sdk.files.list(limit=2, order="asc")] == made
    assert [one.id for one in sdk.files.list(limit=7)] == made[::-1]
    assert not sdk.files.list(limit=7).has_more
    assert [one.id for one in sdk.files.list()] == made[::-1]
    assert [one.id for one in sdk.files.list(after=made[2])] == [made[1], made[0]]
    last = sdk.files.list(after=made[0])
    assert (last.data, last.has_more) == ([], False)


def test_the_client_turns_pages_of_batches(sdk: openai.OpenAI) -> None:
    made = batches(sdk, 5)
    assert [one.id for one in sdk.batches.list(limit=2)] == made[::-1]
    page = sdk.batches.list(limit=2, after=made[3])
    assert ([one.id for one in page.data], page.has_more) == ([made[2], made[1]], True)
    assert len(sdk.batches.list(limit=5).data) == 5


def test_batches_come_twenty_at_a_time(served: Served, sdk: openai.OpenAI) -> None:
    made = batches(sdk, 21)
    page = served.http.get("/v1/batches").json()
    assert [one["id"] for one in page["data"]] == made[:0:-1]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, made[20], made[1])
    assert "created_ns" not in page["data"][0]


def test_files_of_one_purpose(sdk: openai.OpenAI) -> None:
    mine = upload(sdk, 3, "user_data")
    others = upload(sdk, 2)
    assert [one.id for one in sdk.files.list(purpose="user_data", limit=1)] == mine[::-1]
    assert [one.id for one in sdk.files.list(purpose="batch")] == others[::-1]
    assert sdk.files.list(purpose="evals").data == []
    # The page after a file of another purpose.
    assert sdk.files.list(purpose="user_data", after=others[0], limit=2).data[0].id == mine[2]


def test_files_are_deleted_while_they_are_listed(served: Served, sdk: openai.OpenAI) -> None:
    """The page after a file that has gone is asked for then."""
    upload(sdk, 7)
    for file in sdk.files.list(limit=2):
        sdk.files.delete(file.id)
    page = served.http.get("/v1/files").json()
    assert page == {
        "object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/v1/files", "limit", "0"),
        ("/v1/files", "limit", "10001"),
        ("/v1/files", "limit", "many"),
        ("/v1/files", "limit", "1.5"),
        ("/v1/files", "limit", ""),
        ("/v1/files", "order", "up"),
        ("/v1/files", "purpose", "x"),
        ("/v1/files", "after", "file-0"),
        ("/v1/files", "after", "../x"),
        ("/v1/batches", "limit", "101"),
        ("/v1/batches", "limit", "-1"),
        ("/v1/batches", "after", "batch_" + "0" * 24),
    ],
)
def test_a_bad_value_is_refused_by_name(served: Served, path: str, name: str, value: str) -> None:
    answer = served.http.get(path, params={name: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, name, "invalid_value")
    assert name in error["message"]


def test_items_of_a_response(served: Served, sdk: openai.OpenAI) -> None:
    texts = ["a", "b", "c", "d"]
    answer = sdk.responses.create(
        model="letters", input=[{"role": "user", "content": text} for text in texts]
    )
    items = sdk.responses.input_items

    def told(**how: object) -> list[str]:
        return [str(one.content) for one in items.list(answer.id, **how)]  # type: ignore[arg-type,union-attr]

    assert told() == told(limit=1) == texts[::-1]
    assert told(limit=3, order="asc") == texts
    bad = served.http.get(f"/v1/responses/{answer.id}/input_items", params={"after": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "after")


def test_the_document_has_the_parameters(served: Served) -> None:
    paths = served.http.get("/schema/openapi.json").json()["paths"]
    named = {one["name"]: one for one in paths["/v1/files"]["get"]["parameters"]}
    assert set(named) == {"after", "limit", "order", "purpose"}
    assert (named["limit"]["schema"]["minimum"], named["limit"]["schema"]["maximum"]) == (1, 10_000)
    assert {one["name"] for one in paths["/v1/batches"]["get"]["parameters"]} >= {"after", "limit"}
