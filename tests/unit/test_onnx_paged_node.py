"""The export with com.microsoft.PagedAttention: what ONNX Runtime's schema says, and its wiring.

No CPU provider has the operator. Its schema is checked by ONNX Runtime itself, which gets as far as
looking for an implementation; the numbers by onnx's reference evaluator with a stand-in written from
the operator's documentation.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halyard.api.cli import export
from halyard.hal.errors import ConfigError
from halyard.models.tiny import save_tiny_model

onnx = pytest.importorskip("onnx", reason='needs pip install "halyard[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "halyard[onnx]"')

from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

BLOCK = 16


class PagedAttention(OpRun):  # type: ignore[misc]
    """The operator, in fp32, from its documentation."""

    op_domain = "com.microsoft"

    def _run(self, *inputs: Any, num_heads: int = 0, kv_num_heads: int = 0, scale: float = 0.0,
             softcap: float = 0.0, local_window_size: int = -1, **_: Any) -> Any:  # fmt: skip
        q, k, v, keys, values, starts, past, tables = inputs[:8]
        slots, sinks, bounds = inputs[10], inputs[11], inputs[16]
        dim = keys.shape[3]
        keys, values = keys.copy(), values.copy()
        kept = slots >= 0
        for cache, new in ((keys, k), (values, v)):
            cache.reshape(-1, kv_num_heads, dim)[slots[kept]] = new.reshape(-1, kv_num_heads, dim)[
                kept
            ]
        out = np.empty((len(q), num_heads, dim), np.float32)
        for row in range(len(past)):
            first, last = starts[row], starts[row + 1]
            length = past[row] + last - first
            assert bounds[0] >= last - first
            assert bounds[1] >= length
            places = np.arange(length)
            at = tables[row][places // BLOCK], places % BLOCK
            group = num_heads // kv_num_heads
            key, value = (
                np.repeat(cache[at], group, axis=1).astype(np.float32) for cache in (keys, values)
            )
            mine = q[first:last].reshape(-1, num_heads, dim).astype(np.float32)
            scores = np.einsum("qhd,khd->hqk", mine, key) * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            distance = (past[row] + np.arange(last - first))[:, None] - places
            seen = distance >= 0
            if local_window_size > 0:
                seen &= distance < local_window_size
            scores = np.where(seen, scores, -np.inf)
            top = scores.max(-1, keepdims=True)
            shares = np.exp(scores - top)
            total = shares.sum(-1, keepdims=True)
            if sinks is not None:
                total = total + np.exp(sinks.astype(np.float32)[:, None, None] - top)
            out[first:last] = np.einsum("hqk,khd->qhd", shares / total, value)
        return out.reshape(len(q), -1).astype(q.dtype), keys, values


def run_export(*words: str) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args(words))


@pytest.fixture(params=["llama", "gemma2", "gpt-oss", "mixtral"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = save_tiny_model(request.param, tmp_path / "model")
    words = (str(tmp_path / "model"), "--onnx", str(tmp_path / "out"), "--dtype", "float16")
    assert run_export(*words, "--paged-attention") == 0
    return model, tmp_path / "out"


def test_it_follows_the_schema_and_its_wiring_is_right(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    file = folder / "model.paged_attention.onnx"
    onnx.checker.check_model(str(file))
    with pytest.raises(Exception, match="NOT_IMPLEMENTED") as refused:
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert "PagedAttention" in str(refused.value)  # found, and its types are right
    assert "slot_mapping" in (folder / "README.md").read_text()

    session = ReferenceEvaluator(str(file), new_ops=[PagedAttention])
    layers = model.config.num_hidden_layers
    shape = next(value for value in onnx.load(file, load_external_data=False).graph.input
                 if value.name == "key_cache_0").type.tensor_type.shape  # fmt: skip
    heads, dim = (d.dim_value for d in shape.dim[2:])
    generator = random.Random(1)
    sequences = [[generator.randrange(128) for _ in range(n)] for n in (23, 9, 17)]
    blocks = iter(generator.sample(range(8), 8))
    tables = [[next(blocks) for _ in range(-(-len(s) // BLOCK))] for s in sequences]
    caches = {f"{kind}_cache_{n}": np.full((8, BLOCK, heads, dim), np.nan, np.float16)
              for kind in ("key", "value") for n in range(layers)}  # fmt: skip
    done, got = [0, 0, 0], [[], [], []]  # type: tuple[list[int], list[list[Any]]]
    names = ["logits"] + [name.replace("cache_", "cache_out_") for name in caches]
    for counts in ({0: 16, 1: 8}, {0: 5, 1: 1, 2: 16}, {0: 1, 2: 1}):
        rows = list(counts)
        spans = {row: range(done[row], done[row] + counts[row]) for row in rows}
        flat = [(row, position) for row in rows for position in spans[row]]
        starts = np.cumsum([0, *counts.values()])
        width = max(len(tables[row]) for row in rows)
        padded = [tables[row] + [-1] * (width - len(tables[row])) for row in rows]
        feeds = {
            "input_ids": np.array([sequences[row][position] for row, position in flat]),
            "positions": np.array([position for _, position in flat]),
            "logit_indices": np.arange(len(flat)),
            "query_start": starts.astype(np.int32),
            "past_lens": np.array([done[row] for row in rows], np.int32),
            "block_tables": np.array(padded, np.int32),
            "slot_mapping": np.array(
                [tables[row][p // BLOCK] * BLOCK + p % BLOCK for row, p in flat], np.int32
            ),
            "bounds": np.array([16, 32], np.int32),
        }
        logits, *new = session.run(names, feeds | caches)
        caches = dict(zip(caches, new, strict=True))
        for number, row in enumerate(rows):
            done[row] += counts[row]
            got[row].append(torch.from_numpy(logits[starts[number] : starts[number + 1]]))
    with torch.no_grad():
        for row, sequence in enumerate(sequences):
            expected = model(torch.tensor([sequence[: done[row]]])).logits[0]
            found = torch.cat(got[row]).float()
            errors = (found - expected).abs().amax(1) / expected.abs().max()
            # Of fp16: a wrong wire gives about 1, from the first token on. Where experts' choice turns
            # over a rounding, that token and those after it are another text.
            experts = model.config.model_type in ("gpt_oss", "mixtral")
            first = 4 if experts else len(errors)
            assert (errors[:first] < 0.02).all(), f"row {row}: {errors.tolist()}"


def test_other_dtypes_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no float32: give --dtype float16"):
        run_export("embedded", "--onnx", str(tmp_path / "out"), "--paged-attention")
    assert not (tmp_path / "out").exists()
