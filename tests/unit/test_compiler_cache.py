"""The artefact cache with a compiler that writes one small file: keys, damage, races, bounds."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from halyard.compiler.cache import ArtefactCache, default_directory, load_or_build
from halyard.compiler.graph import WeightRecipe
from halyard.compiler.program import HeadShape, UnboundProgram
from halyard.compiler.segments import AttentionCall, SegmentCall
from halyard.hal.types import DeviceInfo, Probe, WeightInfo

INFO = DeviceInfo("cpu", "intel", "x86_64", "a CPU", 1 << 30, 2, ("avx2",))
FACTS = {"model": "m", "dtype": "float32"}


class Executable:
    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs


class FileCompiler:
    """Saves an executable's text."""

    contract_version = (1, 0)
    name = "file"
    keeps = True

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        return Probe(True)

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        return ()

    def compile(self, segment: Any, inputs: Sequence[torch.Tensor], device: DeviceInfo) -> Any:
        raise NotImplementedError

    def save(self, executable: Any, directory: Path) -> bool:
        if self.keeps:
            directory.mkdir()
            (directory / "text").write_text(executable.text)
        return self.keeps

    def load(self, directory: Path, device: DeviceInfo) -> Any:
        return Executable((directory / "text").read_text())


def program(text: str = "code") -> UnboundProgram:
    return UnboundProgram(
        executables=(Executable(text), Executable("last")),
        calls=(
            SegmentCall(0, ("input:input_ids", "weight:w"), ("a", "b", "c")),
            AttentionCall(0, 0.25, 7, 5.0, "a", "b", "c", None, "d"),
            SegmentCall(1, ("d",), ("logits", "states")),
        ),
        result="logits",
        hidden="states",
        recipes={"w": WeightRecipe(("q", "k"))},
        weights={"q": WeightInfo((2, 3), "float32"), "k": WeightInfo((1, 3), "float32")},
        constants={"inv_freq": torch.tensor([1.0, 0.5])},
        heads=HeadShape(4, 2, 16),
        vocab_size=11,
    )


@pytest.fixture
def cache(tmp_path: Path) -> ArtefactCache:
    return ArtefactCache(tmp_path)


def test_what_is_stored_comes_back(cache: ArtefactCache) -> None:
    assert cache.load("k", FileCompiler(), INFO) is None
    assert cache.store("k", program(), FileCompiler())
    found = cache.load("k", FileCompiler(), INFO)
    assert found is not None
    assert found.from_cache
    wrote = program()
    for field in ("calls", "result", "recipes", "weights", "heads", "vocab_size"):
        assert getattr(found, field) == getattr(wrote, field)
    assert torch.equal(found.constants["inv_freq"], wrote.constants["inv_freq"])
    assert [e.text for e in found.executables] == ["code", "last"]  # type: ignore[attr-defined]


def test_key_changes_with_everything_that_matters(
    cache: ArtefactCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = FileCompiler()
    keys = [
        cache.key(FACTS, compiler, INFO),
        cache.key(FACTS | {"model": "n"}, compiler, INFO),
        cache.key(FACTS | {"dtype": "bfloat16"}, compiler, INFO),
        cache.key(FACTS, compiler, DeviceInfo("cpu", "intel", "x86_64", "", 1, 2, ("avx512f",))),
    ]
    monkeypatch.setattr(FileCompiler, "fingerprint", lambda self: "g++ 14", raising=False)
    keys.append(cache.key(FACTS, compiler, INFO))
    monkeypatch.setattr(FileCompiler, "passes", lambda self, device, dtype: ("drop_no_ops",))
    keys.append(cache.key(FACTS, compiler, INFO))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.append(cache.key(FACTS, compiler, INFO))
    monkeypatch.setattr("halyard.compiler.cache._source_digest", lambda: "edited")
    keys.append(cache.key(FACTS, compiler, INFO))
    assert len(set(keys)) == len(keys)
    assert cache.key(FACTS, compiler, INFO) == keys[-1]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("structure.json", b"{"),
        ("segment-0/text", b""),
        ("constants.safetensors", b"12"),
        ("manifest.json", b"[]"),
        ("manifest.json", b"{}"),
        ("segment-1/text", None),
    ],
)
def test_damage_is_discarded_and_made_anew(
    cache: ArtefactCache, name: str, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store("k", program(), FileCompiler())
    file = cache.directory / "k" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    assert cache.load("k", FileCompiler(), INFO) is None
    assert len(caplog.records) == 1
    assert cache.store("k", program("anew"), FileCompiler())
    found = cache.load("k", FileCompiler(), INFO)
    assert found is not None
    assert found.executables[0].text == "anew"  # type: ignore[attr-defined]


def test_compiler_that_keeps_nothing_leaves_nothing(cache: ArtefactCache) -> None:
    compiler = FileCompiler()
    compiler.keeps = False
    assert not cache.store("k", program(), compiler)
    assert list(cache.directory.iterdir()) == []


def test_second_writer_loses_quietly(
    cache: ArtefactCache, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache.store("k", program("first"), FileCompiler())
    assert cache.store("k", program("second"), FileCompiler())
    found = cache.load("k", FileCompiler(), INFO)
    assert found is not None
    assert found.executables[0].text == "first"  # type: ignore[attr-defined]
    assert not caplog.records
    assert [p.name for p in cache.directory.iterdir()] == ["k"]


def _build_once(directory: str, log: str) -> None:
    def build() -> UnboundProgram:
        with open(log, "a") as stream:
            stream.write("built\n")
        return program()

    load_or_build(ArtefactCache(Path(directory)), FACTS, build, FileCompiler(), INFO)


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [
        context.Process(target=_build_once, args=(str(tmp_path), str(log))) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "built\n"


def test_prune_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path)
    for age, key in enumerate(("old", "middle", "new")):
        cache.store(key, program("x" * 5000), FileCompiler())
        os.utime(cache.directory / key, (1000 + age, 1000 + age))
    os.utime(cache.directory / "old")  # used just now
    cache.max_bytes = 8000
    cache.prune()
    assert [entry.name for entry in cache.directory.iterdir()] == ["old"]


def test_directory_that_cannot_be_made_only_costs_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = ArtefactCache(tmp_path / "file")
    found = load_or_build(cache, FACTS, program, FileCompiler(), INFO)
    assert not found.from_cache
    assert caplog.records


def test_manifest_names_every_file(cache: ArtefactCache) -> None:
    cache.store("k", program(), FileCompiler())
    entry = cache.directory / "k"
    written = {str(p.relative_to(entry)) for p in entry.rglob("*") if p.is_file()}
    assert set(json.loads((entry / "manifest.json").read_text())) == written - {"manifest.json"}


def test_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HALYARD_CACHE_DIR", str(tmp_path))
    assert default_directory() == tmp_path
    monkeypatch.delenv("HALYARD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_directory() == tmp_path / "x" / "halyard"
