"""Mirrors and manifests: fetched from a hub of our own, verified at load, refused when touched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, fake_hub
from serve_process import ROOT, ServeProcess

from halyard import LLM
from halyard.api.cli.main import main
from halyard.hal.errors import ModelError
from halyard.hal.types import WeightInfo
from halyard.models import manifest as manifests
from halyard.models.headers import check_checkpoint
from halyard.models.manifest import MANIFEST, problems, read_manifest, verify
from halyard.models.provenance import file_digests
from halyard.models.source import resolve_source
from halyard.models.spec import ModelSpec
from halyard.models.weights import load_weights
from halyard.runtime import build

EMBEDDED = ROOT / "models" / "embedded"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with the embedded model, copied from a folder."""
    root = tmp_path_factory.mktemp("original")
    folder = root / "source" / "small"
    folder.mkdir(parents=True)
    for path in EMBEDDED.iterdir():
        if path.suffix in (".json", ".safetensors", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    assert main(["models", "mirror", str(folder), "--mirror", str(root / "mirror")]) == 0
    return root / "mirror"


@pytest.fixture
def mirror(original: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(original, tmp_path / "mirror")
    return tmp_path / "mirror"


def load(mirror: Path, **options: object) -> LLM:
    defaults: dict[str, object] = {"backend": "null", "kv_blocks": 16, "max_model_len": 64}
    return LLM("small", mirror=mirror, **(defaults | options))


def test_a_model_comes_from_the_hub_that_the_environment_names(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"

    def fetch(url: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT / "pkg"),
            "HALYARD_MIRROR": str(mirror),
        }  # fmt: skip
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "halyard.api.cli.main", "models", "mirror", "acme/tiny"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    with fake_hub(EMBEDDED) as hub:
        hub.damage = WEIGHTS
        bad = fetch(hub.url)
        assert bad.returncode == 2
        told = re.findall(r"[0-9a-f]{64}", bad.stderr)
        assert WEIGHTS in bad.stderr
        assert told[-2:] == [
            hashlib.sha256(hub.content(WEIGHTS)).hexdigest(),
            hashlib.sha256((EMBEDDED / WEIGHTS).read_bytes()).hexdigest(),
        ]
        assert not (mirror / "acme").exists()  # nothing that could be served
        hub.damage = None
        good = fetch(hub.url)
        assert good.returncode == 0, good.stderr
        # What had arrived well is not fetched again.
        assert sum("GET" in line and "tokenizer.json" in line for line in hub.asked) == 1
    found = read_manifest(mirror / "acme" / "tiny")
    assert found is not None
    assert (found[0].model, found[0].revision) == ("acme/tiny", COMMIT)
    assert not problems(mirror / "acme" / "tiny", found[0])
    # The hub is gone now; the mirror is enough.
    source = resolve_source("acme/tiny", None, mirror)
    assert (source.kind, source.revision) == ("mirror", COMMIT)
    assert resolve_source("acme/tiny", COMMIT, mirror) == source
    with pytest.raises(ModelError, match=f"at revision {COMMIT}, not main"):
        resolve_source("acme/tiny", "main", mirror)
    gone = fetch(hub.url)
    assert gone.returncode == 2
    (line,) = gone.stderr.strip().splitlines()
    assert "the hub can't be reached" in line
    assert resolve_source("acme/tiny", None, mirror) == source  # what was there stays


def test_the_model_that_ships_can_be_mirrored(tmp_path: Path) -> None:
    assert resolve_source("embedded", None, tmp_path).kind == "embedded"
    assert main(["models", "mirror", "embedded", "--mirror", str(tmp_path)]) == 0
    assert resolve_source("embedded", None, tmp_path).kind == "mirror"
    flip(tmp_path / "embedded" / WEIGHTS)
    with pytest.raises(ModelError, match=WEIGHTS):
        LLM("embedded", mirror=tmp_path, require_verified=True, backend="null", kv_blocks=16,
            max_model_len=64)  # fmt: skip


def test_a_mirrored_models_weights_are_the_originals(mirror: Path) -> None:
    name = "model.embed_tokens.weight"
    loaded = []
    for source in (resolve_source("small", None, mirror), resolve_source("embedded")):
        (stored,) = (
            s for tensors in check_checkpoint(source).values() for s in tensors if s[0] == name
        )
        wanted = {name: WeightInfo(stored[1], "float32")}
        loaded.append(load_weights(source, ModelSpec.load(source), wanted, "float32")[name])
    assert torch.equal(*loaded)


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    stamp = path.stat().st_mtime_ns
    path.write_bytes(body)
    os.utime(path, ns=(stamp, stamp))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def add(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


INDEX = f"{WEIGHTS}.index.json"
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of the weights": (WEIGHTS, lambda f: flip(f / WEIGHTS)),
    "weights cut short": (WEIGHTS, lambda f: cut(f / WEIGHTS)),
    "empty weights": (WEIGHTS, lambda f: add(f, WEIGHTS, "")),
    "a bit of the tokenizer": ("tokenizer.json", lambda f: flip(f / "tokenizer.json")),
    "another config": ("config.json", lambda f: cut(f / "config.json")),
    "weights not listed": (
        "x.safetensors",
        lambda f: shutil.copy(f / WEIGHTS, f / "x.safetensors"),
    ),
    "unlisted ones in a folder": ("more/w.bin", lambda f: add(f, "more/w.bin", "w")),
    "an index that leads elsewhere": (INDEX, lambda f: add(f, INDEX, "{}")),
    "weights through a link": (WEIGHTS, lambda f: link(f / WEIGHTS, f / "config.json")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_touched_is_never_served(mirror: Path, what: str) -> None:
    name, damage = DAMAGE[what]
    folder = mirror / "small"
    before = read_manifest(folder)
    assert before is not None
    damage(folder)
    with pytest.raises(ModelError) as refused:
        load(mirror)
    line = str(refused.value)
    assert "\n" not in line
    assert name in line
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in line
    listed = before[0].files.get(name)
    assert (listed.sha256 if listed else "the manifest has none") in line
    assert main(["models", "verify", "small", "--mirror", str(mirror)]) == 1
    assert main(["models", "verify", str(folder)]) == 1


def test_a_missing_file_is_named(mirror: Path) -> None:
    (mirror / "small" / "tokenizer.json").unlink()
    with pytest.raises(
        ModelError, match=r"tokenizer.json is missing: the manifest's SHA-256 is \w{64}"
    ):
        load(mirror)


def test_a_server_does_not_start_on_touched_weights(mirror: Path) -> None:
    flip(mirror / "small" / WEIGHTS)
    server = ServeProcess("small", "--mirror", str(mirror), "--backend", "null")
    try:
        assert server.process.wait(60) == 2
    finally:
        server.stop()
    assert "Ready" not in "".join(iter(server.lines.get, ""))
    assert len(re.findall(r"[0-9a-f]{64}", server.stderr)) == 2
    assert WEIGHTS in server.stderr


def test_manifests_are_checked_themselves(mirror: Path) -> None:
    folder = mirror / "small"
    text = (folder / MANIFEST).read_text()
    own = hashlib.sha256(text.encode()).hexdigest()
    load(mirror, require_verified=True, manifest_digest=own)
    load(mirror, require_verified=True, manifest_digest=f"sha256:{own}")
    with pytest.raises(ModelError, match=rf"SHA-256 {own}, but {'0' * 64}"):
        load(mirror, require_verified=True, manifest_digest="0" * 64)
    good = json.loads(text)
    entry = good["files"].pop(WEIGHTS)
    for changed, complaint in (
        ({"version": 2}, "version 2"),
        ({"format": "x"}, "'x' version 1"),
        ({"signed": True}, "unknown field"),
        ({"files": {"../../etc/passwd": entry}}, "no file of this folder"),
        ({"files": {"/etc/passwd": entry}}, "no file of this folder"),
        ({"files": {"a\0b": entry}}, "no file of this folder"),
        ({"files": {WEIGHTS: entry | {"sha256": "A" * 64}}}, "malformed digest"),
    ):
        (folder / MANIFEST).write_text(json.dumps(good | changed))
        with pytest.raises(ModelError, match=complaint):
            load(mirror)
    (folder / MANIFEST).unlink()
    with pytest.raises(ModelError, match="no model 'small' in the mirror"):
        load(mirror)


def test_verified_is_required_where_that_is_asked_for(mirror: Path) -> None:
    with pytest.raises(ModelError, match="can't be verified"):
        LLM("embedded", backend="null", kv_blocks=16, max_model_len=64, require_verified=True)
    folder = mirror / "small"
    LLM(str(folder), backend="null", kv_blocks=16, max_model_len=64, require_verified=True)
    flip(folder / WEIGHTS)  # a manifest beside the files counts without being asked for
    with pytest.raises(ModelError, match="not what its manifest says"):
        LLM(str(folder), backend="null", kv_blocks=16, max_model_len=64)


def test_files_are_hashed_once(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    honest = manifests.sha256_of
    monkeypatch.setattr(manifests, "sha256_of", lambda p: (hashed.append(p.name), honest(p))[1])
    load(mirror)
    found = read_manifest(mirror / "small")
    assert found is not None
    assert sorted(hashed) == sorted(found[0].files)
    told = file_digests(resolve_source("small", None, mirror))
    assert told[WEIGHTS] == f"sha256:{found[0].files[WEIGHTS].sha256}"
    assert len(hashed) == len(found[0].files)  # provenance reads the manifest, not the weights


def test_a_file_that_changes_after_it_was_verified_is_noticed(mirror: Path) -> None:
    verified = verify(mirror / "small")
    verified.check_untouched()
    flip(mirror / "small" / WEIGHTS)
    shutil.copyfile(mirror / "small" / WEIGHTS, mirror / "small" / "new")
    (mirror / "small" / "new").replace(mirror / "small" / WEIGHTS)
    with pytest.raises(ModelError, match="was changed after it was verified"):
        verified.check_untouched()


def test_a_file_that_changes_while_it_is_loaded_ends_the_start(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = build._build_executor

    def slow(*arguments: Any) -> Any:
        made = honest(*arguments)
        shutil.copyfile(mirror / "small" / WEIGHTS, mirror / "small" / "new")
        (mirror / "small" / "new").replace(mirror / "small" / WEIGHTS)
        return made

    monkeypatch.setattr(build, "_build_executor", slow)
    with pytest.raises(ModelError, match=f"{WEIGHTS} was changed after it was verified"):
        load(mirror)


def test_names_stay_inside_the_mirror(
    mirror: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("../small", "a/../../small", "a/b/c", "small\0", "a//b", "-x", "a/.hidden", "ä"):
        with pytest.raises(ModelError):
            resolve_source(name, None, mirror)
    assert main(["models", "list", "--mirror", str(mirror)]) == 0
    assert re.match(
        r"small  19\.6 MB  from a folder  \S+Z  manifest [0-9a-f]{64}\n", capsys.readouterr().out
    )
    assert main(["models", "verify", "--mirror", str(mirror)]) == 0
    assert main(["models", "list", "--mirror", str(mirror / "nowhere")]) == 2
    assert "no such mirror" in capsys.readouterr().err
    monkeypatch.delenv("HALYARD_MIRROR", raising=False)
    assert main(["models", "list"]) == 2
    assert "which mirror?" in capsys.readouterr().err
