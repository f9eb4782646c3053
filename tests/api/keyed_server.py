"""A scripted server with keys: three tenants, one of them an admin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from scripted_engine import ScriptedEngine
from served import Served

from halyard.api.keys import KeyRing, create_key, edit_keys
from halyard.api.tenancy import Tenancy
from halyard.api.tenants import Tenant

__all__ = ["Keyed", "keyed_server"]


@dataclass
class Keyed:
    """The server, its keys, and where they are kept."""

    served: Served
    path: Path
    ring: KeyRing
    tenancy: Tenancy
    keys: dict[str, str]  # by tenant

    def call(
        self, tenant: str | None, method: str, path: str, body: Any = None, **headers: str
    ) -> Any:
        """A response; tenant None: without a key."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if tenant is not None:
            named["authorization"] = f"Bearer {self.keys[tenant]}"
        return self.served.http.request(method, path, json=body, headers=named)

    def ask(self, tenant: str | None, prompt: str = "Hi", **more: Any) -> Any:
        headers = more.pop("headers", {})
        body = {"model": "letters", "prompt": prompt, **more}
        return self.call(tenant, "POST", "/v1/completions", body, **headers)

    def limit(self, tenant: str, **limits: Any) -> None:
        """Change a tenant's limits in the file; the server is told."""
        with edit_keys(self.path) as content:
            old = content.tenants[tenant]
            content.tenants[tenant] = msgspec.structs.replace(old, **limits)
        self.ring.refresh(now=True)


def keyed_server(
    serve_engine: Callable[..., Served],
    folder: Path,
    engine: ScriptedEngine | None = None,
    *,
    request_timeout: float | None = None,
    prompt_log: Path | None = None,
    **app: Any,
) -> Keyed:
    path = folder / "keys.json"
    keys = {}
    with edit_keys(path) as content:
        for name in ("acme", "rival", "boss"):
            content.tenants[name] = Tenant(name, admin=name == "boss")
            keys[name] = create_key(content, name)
    ring = KeyRing(path)
    tenancy = Tenancy(ring, request_timeout, prompt_log)
    served = serve_engine(engine or ScriptedEngine(), tenancy=tenancy, **app)
    return Keyed(served, path, ring, tenancy, keys)
