"""Keys, limits and what belongs to whom, over a real port."""

from __future__ import annotations

import base64
import hmac
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from keyed_server import Keyed, keyed_server
from litestar import Litestar
from scripted_engine import ScriptedEngine
from served import Served

from halyard.api.cli.main import main
from halyard.api.guard import PUBLIC
from halyard.api.keys import edit_keys


@pytest.fixture
def keyed(serve_engine: Callable[..., Served], tmp_path: Path) -> Keyed:
    return keyed_server(serve_engine, tmp_path)


def routes(served: Served) -> list[tuple[str, str]]:
    """(method, path) of everything the application routes, and of its OpenAPI document."""
    found: list[Litestar] = []

    def search(app: Any) -> None:  # through the closures of the middleware around it
        if isinstance(app, Litestar):
            found.append(app)
        for cell in getattr(app, "__closure__", None) or ():
            search(cell.cell_contents)

    search(served.app)
    (app,) = found
    routed = {
        (method, route.path_format)
        for route in app.routes
        for method in getattr(route, "methods", ())
    }
    paths = app.openapi_schema.to_schema()["paths"]
    documented = {(method.upper(), path) for path, item in paths.items() for method in item}
    assert documented <= routed
    assert len(routed) > 40
    return sorted(routed)


def filled(path: str) -> str:
    while "{" in path:
        before, _, rest = path.partition("{")
        path = f"{before}x{rest.partition('}')[2]}"
    return path


def test_every_route_is_closed_without_a_key(keyed: Keyed) -> None:
    unknown = [("GET", "/nothing"), ("POST", "/v1/nothing"), ("GET", "/health/"), ("GET", "//health"),
               ("GET", "/health/../v1/models"), ("GET", "/%2e/health"), ("POST", "/health"),
               ("GET", "/HEALTH"), ("GET", "/ready;x"), ("GET", "/health%00"), ("PATCH", "/v1/models"),
               ("TRACE", "/health"), ("GET", "/page/%2e%2e/%2e%2e/etc/passwd")]  # fmt: skip
    for method, path in [*routes(keyed.served), *unknown]:
        if path in PUBLIC and method in ("GET", "HEAD", "OPTIONS"):
            continue
        for bring in ({}, {"authorization": "Bearer hal-000000000000-" + "A" * 43}):
            answer = keyed.served.http.request(method, filled(path), headers=bring)
            assert answer.status_code == 401, (method, path, answer.status_code)
            if method != "HEAD":
                assert answer.json()["error"]["message"]
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.headers["x-request-id"]
    assert keyed.served.http.get("/health").json() == {"status": "ok"}
    assert keyed.served.http.get("/ready").status_code == 200
    assert keyed.served.engine.generated == 0


def test_why_it_is_not_ready_is_for_those_with_a_key(keyed: Keyed) -> None:
    keyed.ask("acme", "x?")  # breaks the engine
    whole = keyed.call("acme", "GET", "/ready")
    assert whole.status_code == 503
    assert whole.json()["reason"] == "the engine stopped: RuntimeError: secret of the inside"
    for bring in ({}, {"x-api-key": "nobody"}, {"authorization": "Basic !!"}):
        plain = keyed.served.http.get("/ready", headers=bring)
        assert plain.status_code == 503
        assert plain.json() == {
            "ready": False,
            "reason": "the engine has failed: the server's log says why",
            "state": "failed",
        }
        assert "secret" not in keyed.served.http.get("/health", headers=bring).text


@pytest.mark.parametrize("path", ["/admin/reload", "/admin/sleep", "/admin/wake"])
def test_admin_routes_are_an_admins_alone(keyed: Keyed, path: str) -> None:
    keyed.served.host.admin = True  # or nobody could use them
    for tenant, status, code in (
        (None, 401, "invalid_api_key"),
        ("acme", 403, "permission_denied"),
    ):
        answer = keyed.call(tenant, "POST", path, {})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
    assert keyed.call("boss", "POST", path, {}).status_code in (400, 409)  # this engine can't


def test_with_a_key_every_route_opens_but_an_admins(keyed: Keyed) -> None:
    for method, path in routes(keyed.served):
        admins = path.startswith(("/admin", "/metrics"))
        answer = keyed.call("acme", method, filled(path))
        assert (answer.status_code == 403) is admins, (method, path, answer.text)
        assert answer.status_code != 401
        if not admins and not path.startswith(("/v1", "/tokenize", "/detokenize")):
            assert method != "POST", f"{path} changes the server: it belongs below /admin"
    assert keyed.call("boss", "GET", "/metrics").status_code == 200


def test_what_is_no_key(keyed: Keyed) -> None:
    good = keyed.keys["acme"]
    bad = [
        "", "Bearer", f"bearer{good}", f"Token {good}", f"Bearer {good}x",
        f"Bearer {good[:-1]}", f"Bearer {good.upper()}", f"Bearer {good},{good}", "Basic !!!",
        "Basic " + base64.b64encode(b"no colon").decode(), f"Bearer {good[:17]}" + "B" * 43,
    ]  # fmt: skip
    for value in bad:
        answer = keyed.served.http.get("/v1/models", headers={"authorization": value})
        assert answer.status_code == 401, value
    for raw in (
        "Bearer ключ".encode(),
        b"Bearer \xff\xfe" + good.encode(),
        b"Bearer " + b"k" * 9000,
    ):
        answer = keyed.served.http.get("/v1/models", headers=[(b"authorization", raw)])
        assert answer.status_code == 401
    two = [("authorization", f"Bearer {good}"), ("x-api-key", keyed.keys["rival"])]
    assert keyed.served.http.get("/v1/models", headers=two).status_code == 401
    for fine in (
        {"authorization": f"Bearer {good}"},
        {"authorization": f"bearer  {good}"},
        {"x-api-key": good},
        {"x-api-key": good, "authorization": f"Bearer {good}"},
        {"authorization": "Basic " + base64.b64encode(f"me:{good}".encode()).decode()},
    ):
        assert keyed.served.http.get("/v1/models", headers=fine).status_code == 200


def test_a_stranger_costs_one_comparison_like_anybody_else(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    honest = hmac.compare_digest

    def watch(left: str, right: str) -> bool:
        compared.append((len(left), len(right)))
        return honest(left, right)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    good = keyed.keys["acme"].encode()
    for presented in (
        good,
        good[:-1] + b"_",
        b"hal-000000000000-" + b"A" * 43,
        b"",
        b"\0",
        b"x" * 900,
    ):
        compared.clear()
        found = keyed.ring.find(presented)
        assert (found is not None) == (presented == good)
        assert compared == [(64, 64)]


def test_errors_speak_the_clients_language(keyed: Keyed) -> None:
    url = f"http://127.0.0.1:{keyed.served.port}"
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    claude = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as denied:
        claude.messages.create(
            model="letters", max_tokens=3, messages=[{"role": "user", "content": "a"}]
        )
    assert denied.value.body["error"]["type"] == "authentication_error"  # type: ignore[index, call-overload]
    claude = anthropic.Anthropic(base_url=url, api_key=keyed.keys["acme"], max_retries=0)
    said = claude.messages.create(
        model="letters", max_tokens=3, messages=[{"role": "user", "content": "a"}]
    )
    assert said.content[0].text == "Hel"  # type: ignore[union-attr]
    keyed.limit("acme", requests_per_minute=1)
    friend = openai.OpenAI(base_url=f"{url}/v1", api_key=keyed.keys["acme"], max_retries=0)
    friend.completions.create(model="letters", prompt="a", max_tokens=1)
    with pytest.raises(openai.RateLimitError) as limited:
        friend.completions.create(model="letters", prompt="a", max_tokens=1)
    assert limited.value.code == "rate_limit_exceeded"
    assert int(limited.value.response.headers["retry-after"]) in (59, 60)
    with pytest.raises(anthropic.RateLimitError):
        claude.messages.create(
            model="letters", max_tokens=3, messages=[{"role": "user", "content": "a"}]
        )


def test_keys_change_without_a_restart(keyed: Keyed, capsys: pytest.CaptureFixture[str]) -> None:
    def status(key: str) -> int:
        bring = {"authorization": f"Bearer {key}"}
        return keyed.served.http.get("/v1/models", headers=bring).status_code

    file = str(keyed.path)
    assert (
        main(["keys", "create", "newcomer", "--tokens-per-minute", "50", "--api-keys", file]) == 0
    )
    fresh = capsys.readouterr().out.strip()
    assert keyed.served.until(lambda: status(fresh) == 200)
    assert main(["keys", "list", "--api-keys", file]) == 0
    told = capsys.readouterr().out
    assert "newcomer: tokens_per_minute 50" in told
    assert fresh not in told
    _, key_id, secret = fresh.split("-", 2)  # the secret may begin with a dash
    assert secret not in keyed.path.read_text()  # the file can't be used to call
    assert main(["keys", "revoke", key_id, "--api-keys", file]) == 0
    assert keyed.served.until(lambda: status(fresh) == 401)
    good = keyed.path.read_text()
    keyed.path.write_text("{")  # an editor's half-written file takes nobody's key away
    os.utime(keyed.path, (1, 1))
    keyed.ring.refresh(now=True)
    assert status(keyed.keys["acme"]) == 200
    keyed.path.write_text(good)
    assert main(["keys", "revoke", "acme", "--api-keys", file]) == 0
    keyed.ring.refresh(now=True)
    assert status(keyed.keys["acme"]) == 401
    assert status(keyed.keys["rival"]) == 200


def test_a_key_ends_when_its_time_has_come(keyed: Keyed) -> None:
    with edit_keys(keyed.path) as content:
        content.keys = [
            type(key)(**({f: getattr(key, f) for f in key.__struct_fields__} | {"expires": 1}))
            if key.tenant == "rival" else key for key in content.keys
        ]  # fmt: skip
    keyed.ring.refresh(now=True)
    assert keyed.ask("rival").status_code == 401
    assert keyed.ask("acme").status_code == 200


def test_limits(serve_engine: Callable[..., Served], tmp_path: Path) -> None:
    keyed = keyed_server(serve_engine, tmp_path, ScriptedEngine("a" * 200, pause=0.01))
    keyed.limit("acme", tokens_per_minute=60, max_context=30)
    first = keyed.ask("acme", "x" * 20, max_tokens=100)
    assert first.status_code == 200
    assert first.json()["usage"]["completion_tokens"] == 10  # max_context
    assert first.headers["x-ratelimit-limit-tokens"] == "60"
    assert 30 <= int(first.headers["x-ratelimit-remaining-tokens"]) <= 60
    assert keyed.ask("acme", "x" * 31).json()["error"]["code"] == "context_length_exceeded"
    assert keyed.ask("acme", "x" * 25, max_tokens=5).status_code == 200
    over = keyed.ask("acme", "x" * 25, max_tokens=5)
    assert over.status_code == 429
    assert 20 <= int(over.headers["retry-after"]) <= 60
    assert keyed.ask("rival", "x" * 25, max_tokens=5).status_code == 200  # not its limit
    # As many at once as allowed; the place is free again when an answer ends or its reader leaves.
    keyed.limit("rival", concurrent_requests=1)
    keyed.served.engine.pause = 0.1  # a stream of ten seconds, however loaded the machine is
    body = {"model": "letters", "prompt": "x", "max_tokens": 100, "stream": True}
    bring = {"authorization": f"Bearer {keyed.keys['rival']}"}
    with keyed.served.http.stream("POST", "/v1/completions", json=body, headers=bring) as stream:
        lines = stream.iter_lines()  # held: an iterator that goes closes the stream
        next(lines)
        busy = keyed.ask("rival", max_tokens=1)
        assert busy.status_code == 429
        assert "1 requests at once" in busy.json()["error"]["message"]
    assert keyed.served.until(lambda: keyed.ask("rival", max_tokens=1).status_code == 200)
    # Models, by name.
    keyed.limit("boss", models=("other",))
    assert keyed.ask("boss").status_code == 403
    assert keyed.call("boss", "GET", "/v1/models").json()["data"] == []
    assert keyed.ask("acme", model="other").status_code in (404, 429)


def test_priorities_and_shares_reach_the_engine_within_limits(keyed: Keyed) -> None:
    seen: list[Any] = []
    add = keyed.served.engine.add
    keyed.served.engine.add = lambda request: (seen.append(request), add(request))[1]  # type: ignore[method-assign, assignment]
    keyed.limit("acme", priority=5, share=2.0)
    for asked in (None, -7, 9):
        assert keyed.ask("acme", max_tokens=1, priority=asked, cache_salt="s").status_code == 200
    assert keyed.ask("rival", max_tokens=1, cache_salt="s").status_code == 200
    assert [one.priority for one in seen] == [5, 5, 9, 0]
    assert [(one.tenant, one.share) for one in seen] == [("acme", 2.0)] * 3 + [("rival", 1.0)]
    assert {one.cache_salt for one in seen} == {"acme\0s", "rival\0s"}


def test_files_batches_and_responses_belong_to_their_tenant(keyed: Keyed) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions",
            "body": {"prompt": "secret", "max_tokens": 2}}  # fmt: skip

    def bearer(tenant: str) -> dict[str, str]:
        return {"authorization": f"Bearer {keyed.keys[tenant]}"}

    made = keyed.served.http.post(
        "/v1/files", headers=bearer("acme"), data={"purpose": "batch"},
        files={"file": ("in.jsonl", json.dumps(line).encode())},
    ).json()  # fmt: skip
    assert "tenant" not in made
    batch = keyed.call("acme", "POST", "/v1/batches", {
        "input_file_id": made["id"], "endpoint": "/v1/completions", "completion_window": "24h"}).json()  # fmt: skip

    def now() -> Any:
        return keyed.call("acme", "GET", f"/v1/batches/{batch['id']}").json()

    assert keyed.served.until(lambda: now()["status"] == "completed")
    assert "tenant" not in now()
    output = now()["output_file_id"]
    response = keyed.call(
        "acme", "POST", "/v1/responses", {"model": "letters", "input": "hi"}
    ).json()
    theirs = [
        ("GET", f"/v1/files/{made['id']}"), ("GET", f"/v1/files/{output}/content"),
        ("DELETE", f"/v1/files/{made['id']}"), ("GET", f"/v1/batches/{batch['id']}"),
        ("POST", f"/v1/batches/{batch['id']}/cancel"), ("GET", f"/v1/responses/{response['id']}"),
        ("GET", f"/v1/responses/{response['id']}/input_items"),
        ("POST", f"/v1/responses/{response['id']}/cancel"),
        ("DELETE", f"/v1/responses/{response['id']}"),
    ]  # fmt: skip
    for tenant in ("rival", "boss"):
        for method, path in theirs:
            answer = keyed.call(tenant, method, path)
            assert answer.status_code == 404, (method, path)
            assert "secret" not in answer.text
        assert keyed.call(tenant, "GET", "/v1/files").json()["data"] == []
        assert keyed.call(tenant, "GET", "/v1/batches").json()["data"] == []
        stolen = {
            "input_file_id": made["id"],
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        assert keyed.call(tenant, "POST", "/v1/batches", stolen).status_code == 404
        again = {"model": "letters", "input": "and?", "previous_response_id": response["id"]}
        assert keyed.call(tenant, "POST", "/v1/responses", again).status_code == 404
    for method, path in theirs:
        if method == "GET":
            assert keyed.call("acme", method, path).status_code == 200
    assert keyed.tenancy.meters["acme"].usage.completion_tokens >= 2  # the batch counts


def test_usage_is_ones_own_and_all_for_an_admin(keyed: Keyed) -> None:
    assert keyed.ask("acme", "abcd", max_tokens=3).status_code == 200
    assert keyed.ask("rival", "ab", max_tokens=1).status_code == 200
    own = keyed.call("acme", "GET", "/v1/usage").json()
    assert [row["tenant"] for row in own["data"]] == ["acme"]
    row = own["data"][0]
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (1, 4, 3)
    assert row["running"] == 0
    everybody = keyed.call("boss", "GET", "/v1/usage").json()["data"]
    assert [row["tenant"] for row in everybody] == ["acme", "boss", "rival"]


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("completions", {"prompt": "abcd"}, "queue_full"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "queue_full"),
        ("embeddings", {"input": ["abcd", "efgh"]}, "queue_full"),
        ("completions", {"prompt": ["a", "b" * 300]}, "context_length_exceeded"),
        ("completions", {"prompt": "abcd", "timeout": 0}, "invalid_value"),
    ],
)
def test_what_is_refused_is_not_charged(
    serve_engine: Callable[..., Served], tmp_path: Path, path: str, body: dict[str, Any], code: str
) -> None:
    engine = ScriptedEngine(max_queue_len=1 if code == "queue_full" else None)
    engine.intake.limits = replace(engine.intake.limits, hidden_size=4)  # for embeddings
    keyed = keyed_server(serve_engine, tmp_path, engine)
    keyed.limit("acme", tokens_per_minute=1000)
    engine.num_waiting = 5
    refused = keyed.call("acme", "POST", f"/v1/{path}", body)
    assert refused.json()["error"]["code"] == code
    assert refused.headers["x-ratelimit-remaining-tokens"] == "1000"
    (row,) = keyed.call("acme", "GET", "/v1/usage").json()["data"]
    assert (row["requests"], row["prompt_tokens"], row["running"]) == (0, 0, 0)


def test_usage_tells_what_it_costs(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    client = keyed.served.host.client
    stats = replace(
        client.stats(), prompt_tokens=700_000, generated_tokens=300_000, busy_seconds=1800.0
    )
    monkeypatch.setattr(client, "stats", lambda: stats)
    assert keyed.call("boss", "GET", "/v1/usage").json()["cost_per_million_tokens"] is None
    client.port.facts = replace(client.port.facts, cost_per_hour=2.5)
    assert keyed.ask("acme", "abcd", max_tokens=3).status_code == 200
    told = keyed.call("acme", "GET", "/v1/usage").json()
    assert told["cost_per_hour"] == 2.5
    assert told["cost_per_million_tokens"] == pytest.approx(1.25)  # half an hour for a million
    (row,) = told["data"]
    computed = row["prompt_tokens"] - row["cached_tokens"] + row["completion_tokens"]
    assert row["cost"] == pytest.approx(1.25 * computed / 1e6, abs=1e-6)
    assert computed > 0


def test_prompts_go_to_their_tenants_log_and_nowhere_else(
    serve_engine: Callable[..., Served], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level("DEBUG")
    keyed = keyed_server(serve_engine, tmp_path, prompt_log=tmp_path / "log")
    keyed.limit("rival", log_prompts=False)
    secret = "xyzzy-plugh"
    for tenant in ("acme", "rival"):
        assert keyed.ask(tenant, secret, max_tokens=5).status_code == 200
        keyed.ask(tenant, secret + "!")  # that request fails in the engine
        keyed.ask(tenant, secret, temperature=-1)
        keyed.ask(tenant, secret, max_tokens=5, guided_regex="(" + secret)
        keyed.call(
            tenant,
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": secret, "content": secret}]},
        )
        keyed.call(tenant, "POST", "/v1/chat/completions",
                   {"messages": [{"role": "user", "content": secret}], "model": "letters"})  # fmt: skip
        keyed.served.http.post("/v1/completions", content='{"prompt": "' + secret,
                               headers={"authorization": f"Bearer {keyed.keys[tenant]}"})  # fmt: skip
    lines = [
        json.loads(text) for text in (tmp_path / "log" / "acme.jsonl").read_text().splitlines()
    ]
    assert lines[0]["prompts"] == [secret]
    assert lines[0]["answers"] == ["Hello"]
    assert stat.S_IMODE((tmp_path / "log" / "acme.jsonl").stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "log") == ["acme.jsonl"]
    (tmp_path / "log" / "acme.jsonl").unlink()
    (tmp_path / "log").rmdir()
    (tmp_path / "log").write_text("somebody put a file in its place")
    assert keyed.ask("acme", secret, max_tokens=5).status_code == 200  # its answer it gets
    spilt = "".join(capfd.readouterr())
    logged = "\n".join(record.getMessage() + (record.exc_text or "") for record in caplog.records)
    ours = "\n".join(line for line in logged.splitlines() if secret in line)
    assert not ours
    assert secret not in spilt
    for key in keyed.keys.values():
        assert key not in logged + spilt


def test_a_browser_is_asked_for_a_key_and_other_sites_cant_use_it(keyed: Keyed) -> None:
    http = keyed.served.http
    asked = http.get("/", headers={"accept": "text/html,*/*"})
    assert asked.status_code == 401
    assert asked.headers["www-authenticate"].startswith("Basic ")
    basic = {
        "authorization": "Basic " + base64.b64encode(f":{keyed.keys['acme']}".encode()).decode()
    }
    assert http.get("/", headers=basic).status_code == 200
    assert http.get("/status", headers=basic).status_code == 200
    body = {"model": "letters", "prompt": "a", "max_tokens": 1}
    here = f"http://127.0.0.1:{keyed.served.port}"
    for headers, status in (
        ({}, 200),
        ({"origin": here, "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ):
        answer = http.post("/v1/completions", json=body, headers=basic | headers)
        assert answer.status_code == status, headers
    bearer = {"authorization": f"Bearer {keyed.keys['acme']}", "origin": "https://evil.example"}
    assert http.post("/v1/completions", json=body, headers=bearer).status_code == 200


def test_without_keys_everybody_is_one_tenant(served: Served) -> None:
    assert (
        served.post("/v1/completions", model="letters", prompt="ab", max_tokens=1).status_code
        == 200
    )
    (row,) = served.http.get("/v1/usage").json()["data"]
    assert (row["tenant"], row["requests"]) == ("default", 1)
    assert served.http.get("/metrics").status_code == 200


def test_refusals_are_fast_even_of_large_bodies(keyed: Keyed) -> None:
    started = time.monotonic()
    answer = keyed.served.http.post("/v1/completions", content=b"x" * (8 << 20))
    assert answer.status_code == 401
    assert time.monotonic() - started < 5
