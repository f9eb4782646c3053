"""What `halyard export --onnx` writes runs elsewhere, with numpy and onnxruntime alone."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from halyard.api.cli import export
from halyard.hal.errors import BackendUnavailableError, ConfigError, HalyardError
from halyard.models.tiny import save_tiny_model

pytest.importorskip("onnx", reason='needs pip install "halyard[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "halyard[onnx]"')

FAMILIES = ("llama", "gemma2", "gpt-oss", "mixtral")  # gemma2: softcap, windows; gpt-oss: sinks


def run_export(*words: str) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args(words))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """family -> (Hugging Face model, export)"""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for family in FAMILIES:
        model = save_tiny_model(family, root / f"{family}-checkpoint")
        assert run_export(str(root / f"{family}-checkpoint"), "--onnx", str(root / family)) == 0
        made[family] = (model, root / family)
    return made


def session_of(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_readme_s_example_gives_hugging_face_s_tokens(
    family: str, exported: dict[str, tuple[Any, Path]]
) -> None:
    model, folder = exported[family]
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    code = found.group(1)
    assert set(re.findall(r"^import (\w+)", code, re.MULTILINE)) == {"sys", "numpy", "onnxruntime"}
    prompt = [random.Random(4).randrange(128) for _ in range(19)]  # beyond a block and a window
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, prompt)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 19), max_new_tokens=16,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    assert [int(word) for word in done.stdout.split()] == ids[0, 19:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_program_on_mixed_steps(family: str, exported: dict[str, tuple[Any, Path]]) -> None:
    model, folder = exported[family]
    session = session_of(folder / "model.onnx")
    facts = json.loads((folder / "program.json").read_text())
    block, generator = 4, random.Random(1)
    sequences = [[generator.randrange(128) for _ in range(n)] for n in (23, 9, 17)]
    free = generator.sample(range(40), 40)
    tables = [[free.pop() for _ in range(-(-len(s) // block))] for s in sequences]
    heads = facts["heads"]
    shape = (facts["num_layers"], 40, block, heads["num_kv_heads"], heads["head_dim"])
    caches = [np.full(shape, 1e3, np.float32) for _ in range(2)]  # stale contents are ignored
    done, got = [0, 0, 0], [[], [], []]  # type: tuple[list[int], list[list[Any]]]
    for counts in ({0: 10, 1: 8}, {0: 6, 1: 1, 2: 5}, {0: 6, 2: 11}, {0: 1, 2: 1}):
        rows = list(counts)
        spans = {row: range(done[row], done[row] + counts[row]) for row in rows}
        positions = [position for row in rows for position in spans[row]]
        places = [(tables[r][p // block], p % block) for r in rows for p in spans[r]]
        starts = np.cumsum([0, *counts.values()])
        width = max(len(tables[row]) for row in rows)
        logits, *new = session.run(
            ["logits", "new_keys", "new_values"],
            {
                "input_ids": np.array([sequences[r][p] for r in rows for p in spans[r]]),
                "positions": np.array(positions),
                "logit_indices": np.arange(len(positions)),
                "block_tables": np.array(
                    [tables[r] + [-1] * (width - len(tables[r])) for r in rows], np.int32
                ),
                "seq_lens": np.array([done[r] + counts[r] for r in rows], np.int32),
                "query_start": starts.astype(np.int32),
                "key_cache": caches[0],
                "value_cache": caches[1],
            },
        )
        blocks, offsets = (np.array(column) for column in zip(*places, strict=True))
        for cache, made in zip(caches, new, strict=True):
            cache[:, blocks, offsets] = made
        for number, row in enumerate(rows):
            done[row] += counts[row]
            got[row].append(torch.from_numpy(logits[starts[number] : starts[number + 1]]))
    with torch.no_grad():
        for row, sequence in enumerate(sequences):
            expected = model(torch.tensor([sequence[: done[row]]])).logits[0]
            torch.testing.assert_close(torch.cat(got[row]), expected, atol=1e-4, rtol=1e-4)


def attend(q: Any, k: Any, v: Any, call: dict[str, Any], sinks: Any) -> Any:
    """One whole sequence, as README.md describes an attention call."""
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * call["scale"]
    if call["softcap"]:
        scores = call["softcap"] * np.tanh(scores / call["softcap"])
    distance = np.arange(len(q))[:, None] - np.arange(len(q))
    seen = (distance >= 0) & ((distance < call["window"]) if call["window"] else True)
    shares = np.exp(np.where(seen, scores, -np.inf))
    total = shares.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks)[:, None, None]
    return np.einsum("hqk,khd->qhd", shares / total, v).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_run_as_program_json_says(
    family: str, exported: dict[str, tuple[Any, Path]]
) -> None:
    model, folder = exported[family]
    facts = json.loads((folder / "program.json").read_text())
    tokens = [random.Random(2).randrange(128) for _ in range(13)]
    values: dict[str, Any] = {
        f"weight:{name}": array
        for name, array in safetensors.numpy.load_file(folder / facts["weights"]).items()
    }
    values["input:input_ids"] = np.array(tokens)
    values["input:positions"] = values["input:logit_indices"] = np.arange(13)
    sessions = [session_of(folder / segment["file"]) for segment in facts["segments"]]
    for call in facts["calls"]:
        if call["kind"] == "segment":
            segment = facts["segments"][call["segment"]]
            feeds = {n: values[v] for n, v in zip(segment["inputs"], call["inputs"], strict=True)}
            made = sessions[call["segment"]].run(segment["outputs"], feeds)
            values |= zip(call["outputs"], made, strict=True)
        else:
            sinks = None if call["sinks"] is None else values[call["sinks"]]
            q, k, v = (values[call[name]] for name in "qkv")
            values[call["output"]] = attend(q, k, v, call, sinks)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    found = torch.from_numpy(values[facts["result"]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_weights_are_written_once(exported: dict[str, tuple[Any, Path]]) -> None:
    model, folder = exported["llama"]
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert (folder / "weights.safetensors").stat().st_size < weights * 1.1
    assert (folder / "model.onnx").stat().st_size < 100_000
    segments = list((folder / "segments").iterdir())
    assert len(segments) == 3  # first, middle, last


def test_float16_files_say_so(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    run_export(str(tmp_path / "model"), "--onnx", str(tmp_path / "out"), "--dtype", "float16")
    facts = json.loads((tmp_path / "out" / "program.json").read_text())
    assert facts["dtype"] == "float16"
    session = session_of(tmp_path / "out" / "model.onnx")
    kinds = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    assert kinds["key_cache"] == kinds["logits"] == "tensor(float16)"
    assert "np.float16" in (tmp_path / "out" / "README.md").read_text()


# ---- what a user may get wrong


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: give a new or an empty folder"):
        run_export("embedded", "--onnx", str(tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        run_export("embedded", "--onnx", str(tmp_path / "mine.txt"))
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere: make it first"):
        run_export("embedded", "--onnx", str(tmp_path / "nowhere" / "out"))


def test_an_unwritable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(ConfigError, match=r"can't write to .*out: Permission denied$"):
        run_export("embedded", "--onnx", str(tmp_path / "out"))


def test_a_missing_extra_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailableError, match=re.escape('pip install "halyard[onnx]"')):
        run_export("no such model", "--onnx", str(tmp_path / "out"))


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path) -> None:
    save_tiny_model("deepseek-v3", tmp_path / "model")
    with pytest.raises(HalyardError, match="can't hold the operator") as caught:
        run_export(str(tmp_path / "model"), "--onnx", str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    save_tiny_model("llama-tied", tmp_path / "model")
    (tmp_path / "out").mkdir()
    assert run_export(str(tmp_path / "model"), "--onnx", str(tmp_path / "out")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "model.onnx", "program.json", "segments", "weights.safetensors",
    ]  # fmt: skip
