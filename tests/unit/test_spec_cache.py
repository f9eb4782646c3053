"""A spec that was read before is the same spec, and needs no transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from halyard.hal.errors import ModelError
from halyard.models.source import resolve_source
from halyard.models.spec import ModelSpec
from halyard.models.spec_cache import SpecCache
from halyard.runtime.config import EngineConfig


@pytest.fixture
def cache(tmp_path: Path) -> SpecCache:
    return SpecCache(tmp_path / "specs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = Path(resolve_source("embedded").path)
    target = tmp_path / "model"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return target


def facts(spec: ModelSpec) -> dict[str, object]:
    return {one.name: getattr(spec, one.name) for one in fields(spec) if one.name != "held"}


def test_equals_what_was_read(cache: SpecCache, folder: Path, monkeypatch: pytest.MonkeyPatch):
    source = resolve_source(str(folder))
    plain, first = ModelSpec.load(source), ModelSpec.load(source, cache)
    assert facts(plain) == facts(first)
    monkeypatch.setattr("halyard.models.spec._read_config", lambda _: pytest.fail("read again"))
    second = ModelSpec.load(source, cache)
    assert facts(second) == facts(first)
    assert second == first
    monkeypatch.undo()
    assert second.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_changed_file_is_read_anew(cache: SpecCache, folder: Path, name: str):
    source = resolve_source(str(folder))
    before = ModelSpec.load(source, cache)
    file = folder / name
    changed = json.loads(file.read_text()) if file.exists() else {}
    changed |= {"eos_token_id": [7], "max_position_embeddings": 99}
    file.write_text(json.dumps(changed))
    after = ModelSpec.load(source, cache)
    if name == "config.json":  # end tokens are those of the generation config, if it has some
        assert (before.max_model_len, after.max_model_len) == (2048, 99)
    else:
        assert after.eos_token_ids == (7,) != before.eos_token_ids


def test_damage_is_no_harm(cache: SpecCache, folder: Path):
    source = resolve_source(str(folder))
    first = ModelSpec.load(source, cache)
    (entry,) = cache.directory.iterdir()
    for damage in ("", "{", "[]", "{}", '{"vocab_size": 3}'):
        entry.write_text(damage)
        assert ModelSpec.load(source, cache) == first
    shutil.rmtree(cache.directory)
    cache.directory.write_text("in the way")
    assert ModelSpec.load(source, cache) == first


def test_a_full_disk_is_told_and_leaves_nothing(
    cache: SpecCache,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("halyard.models.spec_cache.json.dump", full)
    source = resolve_source(str(folder))
    assert ModelSpec.load(source, cache) == ModelSpec.load(source)
    assert list(cache.directory.iterdir()) == []
    assert "No space left" in caplog.text


def test_errors_are_told_each_time(cache: SpecCache, folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    source = resolve_source(str(folder))
    for _ in range(2):
        with pytest.raises(ModelError):
            ModelSpec.load(source, cache)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_second_plan_imports_neither_transformers_nor_tvm(tmp_path: Path, load_format: str):
    code = """
import sys
from pathlib import Path
from halyard.runtime.config import EngineConfig
from halyard.runtime.planner import make_plan
make_plan(EngineConfig(model="embedded", cache_dir=Path(sys.argv[1]), load_format=sys.argv[2]))
print(*sorted({"transformers", "tvm", "onnxruntime", "onnx"} & set(sys.modules)))
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), load_format],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert found == [["transformers"], []]


def test_folders_may_be_given_as_text(tmp_path: Path) -> None:
    config = EngineConfig("embedded", cache_dir=str(tmp_path), mirror="~/models")  # type: ignore[arg-type]
    assert config.cache_dir == tmp_path
    assert config.mirror == Path.home() / "models"
    assert config.dump_dir is None
