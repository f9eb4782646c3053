"""Every answer's fingerprint leads to what made it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer, live_server

from halyard.models.provenance import file_digests, fingerprint
from halyard.models.source import ModelSource, resolve_source


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with live_server("reference") as server:
        yield server


def test_a_fingerprint_leads_to_its_facts(live: LiveServer) -> None:
    with httpx.Client(base_url=live.url, timeout=60) as http:
        body = {"prompt": "x", "max_tokens": 2, "temperature": 0}
        answer = http.post("/v1/completions", json=body).json()
        named = answer["system_fingerprint"]
        assert named.startswith("fp_")
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert http.post("/v1/chat/completions", json=chat).json()["system_fingerprint"] == named
        facts = http.get(f"/v1/provenance/{named}").json()
        assert facts["fingerprint"] == named
        assert facts["backend"]["name"] == "reference"
        assert facts["versions"]["torch"]
        weights = resolve_source("embedded").path / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert facts["model"]["files"]["model.safetensors"] == f"sha256:{digest}"
        missing = http.get("/v1/provenance/fp_0")
        assert missing.status_code == 404
        assert missing.json()["error"]["param"] == "fingerprint"


def test_one_byte_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    (tmp_path / "notes.md").write_text("no part of it")
    source = ModelSource("x", tmp_path, "path")
    before = file_digests(source)
    assert sorted(before) == ["a.safetensors", "config.json"]
    (tmp_path / "a.safetensors").write_bytes(b"abd")
    after = file_digests(source)
    assert before["config.json"] == after["config.json"]
    assert fingerprint(before) != fingerprint(after)


def test_a_file_of_the_hub_s_cache_is_not_read(tmp_path: Path) -> None:
    name = "0" * 64
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"something else")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    digests = file_digests(ModelSource("x", folder, "hub"))
    assert digests == {"model.safetensors": f"sha256:{name}"}
