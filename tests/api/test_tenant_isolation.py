"""What one tenant can learn of another: nothing from the prefix cache, the page, or shared state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from keyed_server import Keyed, keyed_server
from live_server import LiveServer, live_server
from served import Served

from halyard.api.keys import KeyRing, create_key, edit_keys
from halyard.api.tenancy import Tenancy
from halyard.api.tenants import Tenant

TENANTS = ("acme", "rival")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, dict[str, str]]]:
    """A real scheduler and prefix cache behind keys; the null backend computes nothing."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {}
    with edit_keys(path) as content:
        for name in TENANTS:
            content.tenants[name] = Tenant(name)
            keys[name] = create_key(content, name)
    with live_server("null", tenancy=Tenancy(KeyRing(path))) as server:
        yield server, keys


def cached(
    live: tuple[LiveServer, dict[str, str]], tenant: str, prompt: str, **more: Any
) -> tuple[int, int]:
    """(tokens that the answer says came from the cache, tokens that the engine computed for it)."""
    server, keys = live
    before = server.client.stats().prompt_tokens
    answer = httpx.post(
        f"{server.url}/v1/completions",
        headers={"authorization": f"Bearer {keys[tenant]}"},
        json={"prompt": prompt, "max_tokens": 1, **more},
        timeout=30,
    ).json()
    computed = server.client.stats().prompt_tokens - before
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"], computed


def test_the_prefix_cache_tells_no_tenant_what_another_asked(live: Any) -> None:
    """What a probe by time to first token would see is how many tokens are computed: that is counted."""
    prompt = "The merger will be announced on the third of May, at a price of forty a share. " * 8
    hits, whole = cached(live, "acme", prompt)
    assert (hits, whole > 100) == (0, True)
    own_hits, own_computed = cached(live, "acme", prompt)
    assert own_hits > 100  # the cache works
    assert own_computed <= 16
    probes: list[dict[str, Any]] = [
        {}, {"cache_salt": ""}, {"cache_salt": "acme"}, {"cache_salt": "acme\0"}, {"cache_salt": "\0"},
        {"user": "acme"}, {"prompt_cache_key": "acme"},
    ]  # fmt: skip
    for number, probe in enumerate(probes):
        hits, computed = cached(live, "rival", prompt, **probe)
        seen_before = number > 0 and not probe.get("cache_salt")  # by rival itself
        assert (hits > 0) is seen_before, probe
        assert (computed == whole) is not seen_before, probe
    # The same holds the other way round, and for a salt of the client's own.
    assert cached(live, "acme", prompt, cache_salt="mine") == (0, whole)
    assert cached(live, "acme", prompt, cache_salt="mine")[0] > 100
    assert cached(live, "rival", prompt, cache_salt="mine") == (0, whole)


def test_ids_in_other_hands_open_nothing(
    serve_engine: Callable[..., Served], tmp_path: Path
) -> None:
    """Deleting, cancelling or continuing another's response leaves it as it was."""
    keyed = keyed_server(serve_engine, tmp_path)
    made = keyed.call("acme", "POST", "/v1/responses", {"model": "letters", "input": "hi"}).json()
    for method, end in (("DELETE", ""), ("POST", "/cancel"), ("GET", ""), ("GET", "/input_items")):
        assert keyed.call("rival", method, f"/v1/responses/{made['id']}{end}").status_code == 404
    assert keyed.call("acme", "GET", f"/v1/responses/{made['id']}").json()["status"] == "completed"
    # Whoever stores more than all others makes room for them.
    store = keyed.served.app
    for cell in _cells(store):
        if hasattr(cell, "state") and hasattr(cell.state, "responses"):
            cell.state.responses._capacity = 4
    for _ in range(6):
        keyed.call("rival", "POST", "/v1/responses", {"model": "letters", "input": "x"})
    assert keyed.call("acme", "GET", f"/v1/responses/{made['id']}").status_code == 200


def _cells(app: Any) -> Iterator[Any]:
    yield app
    for cell in getattr(app, "__closure__", None) or ():
        yield from _cells(cell.cell_contents)


def test_a_batch_goes_on_in_its_tenants_name_after_a_restart(
    serve_engine: Callable[..., Served], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    first = keyed_server(serve_engine, tmp_path, data_dir=data)
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions",
            "body": {"prompt": "a", "max_tokens": 2}}  # fmt: skip
    uploaded = first.served.http.post(
        "/v1/files", headers={"authorization": f"Bearer {first.keys['acme']}"},
        data={"purpose": "batch"}, files={"file": ("in.jsonl", json.dumps(line).encode())},
    ).json()  # fmt: skip
    asked = {
        "input_file_id": uploaded["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    batch = first.call("acme", "POST", "/v1/batches", asked).json()

    def ended(keyed: Keyed) -> Any:
        def look() -> bool:
            return bool(
                keyed.call("acme", "GET", f"/v1/batches/{batch['id']}").json()["status"]
                in ("completed", "failed")
            )

        assert keyed.served.until(look)
        return keyed.call("acme", "GET", f"/v1/batches/{batch['id']}").json()

    assert ended(first)["status"] == "completed"
    first.served.stop()
    stored = next((data / "batches").glob("batch_*.json"))
    facts = json.loads(stored.read_text())
    assert facts["tenant"] == "acme"
    stored.write_text(json.dumps(facts | {"status": "in_progress", "output_file_id": None}))
    shutil.rmtree(tmp_path / "second", ignore_errors=True)
    (tmp_path / "second").mkdir()
    second = keyed_server(serve_engine, tmp_path / "second", data_dir=data)
    assert ended(second)["status"] == "completed"
    assert second.tenancy.meters["acme"].usage.completion_tokens == 2
    second.served.stop()
    # A tenant that has gone has nobody to answer for.
    stored.write_text(
        json.dumps(json.loads(stored.read_text()) | {"status": "in_progress", "tenant": "gone"})
    )
    (tmp_path / "third").mkdir()
    third = keyed_server(serve_engine, tmp_path / "third", data_dir=data)
    assert third.served.until(lambda: json.loads(stored.read_text())["status"] == "failed")


def test_the_page_works_behind_a_key_in_a_browser(
    serve_engine: Callable[..., Served], tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    keyed = keyed_server(serve_engine, tmp_path)
    url = f"http://127.0.0.1:{keyed.served.port}/"
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with pytest.raises(sync_api.Error, match="AUTH"):  # nobody answers its prompt
            browser.new_page().goto(url)
        person = browser.new_context(
            http_credentials={"username": "me", "password": keyed.keys["acme"]}
        ).new_page()
        with person.expect_response(lambda answer: answer.url.endswith("/status")) as status:
            assert person.goto(url).status == 200
        assert status.value.status == 200  # its own requests carry the key too
        browser.close()
