"""As much of the Hugging Face hub as a download needs, on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["COMMIT", "FakeHub", "fake_hub"]

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class FakeHub:
    """Serves one model; what was asked of it is noted."""

    url: str
    model: str
    folder: Path
    asked: list[str] = field(default_factory=list)
    damage: str | None = None  # a file that arrives with a byte changed

    def content(self, name: str) -> bytes:
        body = (self.folder / name).read_bytes()
        return body[:-1] + bytes([body[-1] ^ 1]) if name == self.damage else body

    def files(self) -> list[dict[str, Any]]:
        """Of the tree, as the hub lists them."""
        found = []
        for path in sorted(p for p in self.folder.iterdir() if p.is_file()):
            body = path.read_bytes()
            one: dict[str, Any] = {
                "type": "file",
                "path": path.name,
                "size": len(body),
                "oid": "0" * 40,
            }
            if path.suffix == ".safetensors":
                digest = hashlib.sha256(body).hexdigest()
                one["lfs"] = {"oid": digest, "size": len(body), "pointerSize": 134}
            found.append(one)
        return found

    def info(self) -> dict[str, Any]:
        siblings = []
        for one in self.files():
            sibling = {"rfilename": one["path"], "size": one["size"], "blobId": one["oid"]}
            if "lfs" in one:
                sibling["lfs"] = {**one["lfs"], "sha256": one["lfs"]["oid"]}
            siblings.append(sibling)
        return {"id": self.model, "modelId": self.model, "sha": COMMIT, "private": False,
                "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip


@contextmanager
def fake_hub(folder: Path, model: str = "acme/tiny") -> Iterator[FakeHub]:
    """Serve a folder's files as a model of the hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if path.startswith(f"/api/models/{hub.model}"):
                rest = path.removeprefix(f"/api/models/{hub.model}")
                if rest.startswith(f"/tree/{COMMIT}"):
                    body = json.dumps(hub.files()).encode()
                    self.answer(200, body, Content_Type="application/json")
                elif rest in ("", f"/revision/{COMMIT}", "/revision/main"):
                    self.answer(
                        200, json.dumps(hub.info()).encode(), Content_Type="application/json"
                    )
                else:
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                return
            prefix = f"/{hub.model}/resolve/{COMMIT}/"
            name = path.removeprefix(prefix)
            if not path.startswith(prefix) or not (hub.folder / name).is_file():
                self.answer(404, b"", X_Error_Code="RepoNotFound")
                return
            body = hub.content(name)
            self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

        do_HEAD = do_GET  # noqa: N815 - http.server's name

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}", model, folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
