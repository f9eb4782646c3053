"""`halyard serve --api-keys` as a process: what it says, and SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from serve_process import ServeProcess

from halyard.api.cli.main import main
from halyard.api.keys import create_key, edit_keys
from halyard.api.server import ServerConfig
from halyard.api.tenants import Tenant
from halyard.hal.errors import ConfigError


def test_a_server_with_keys_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def change(edit: Callable[[], str | None]) -> str | None:
        made = edit()
        server.process.send_signal(signal.SIGHUP)
        return made

    def add(tenant: str) -> str:
        with edit_keys(path) as content:
            content.tenants[tenant] = Tenant(tenant)
            return create_key(content, tenant)

    def revoke(tenant: str) -> None:
        with edit_keys(path) as content:
            content.keys = [key for key in content.keys if key.tenant != tenant]

    first = add("acme")
    server = ServeProcess("--backend", "null", "--kv-blocks", "64", "--api-keys", str(path))
    try:
        server.wait_for("Ready")
        assert '-H "authorization: Bearer $KEY"' in server.wait_for("curl")
        with httpx.Client(base_url=server.url) as http:

            def becomes(key: str | None, status: int) -> bool:
                transport_tries = 100
                for _ in range(transport_tries):
                    answer = http.get("/v1/models", headers={"x-api-key": key or ""})
                    if answer.status_code == status:
                        return True
                return False

            assert becomes(first, 200)
            second = change(lambda: add("rival"))
            assert becomes(second, 200)
            change(lambda: revoke("acme"))
            assert becomes(first, 401)
            assert becomes(second, 200)
            answer = http.get("/v1/models", headers={"x-api-key": first})
            assert "uvicorn" not in answer.headers.get("server", "")
    finally:
        assert server.stop() == 0
    for key in (first, second or ""):
        assert key not in server.stderr


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for options in ({"request_timeout": 0.0}, {"request_timeout": -1.0}, {"max_connections": 0},
                    {"max_body_bytes": 0}):  # fmt: skip
        with pytest.raises(ConfigError):
            ServerConfig(**options)  # type: ignore[arg-type]
    assert main(["serve", "--port", "0", "--api-keys", str(tmp_path / "none.json")]) == 2
    assert main(["serve", "--port", "0", "--request-timeout", "-3"]) == 2
    (tmp_path / "file").write_text("")
    assert main(["serve", "--port", "0", "--prompt-log", str(tmp_path / "file")]) == 2
