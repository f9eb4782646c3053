"""What `halyard export --onnx --paged-attention` writes, run by ONNX Runtime on a real GPU."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halyard.api.cli import export
from halyard.hal.devices.cuda import CudaDevice
from halyard.models.tiny import save_tiny_model

pytest.importorskip("onnx", reason='needs pip install "halyard[onnx-gpu]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "halyard[onnx-gpu]"')
pytestmark = [
    pytest.mark.skipif(not CudaDevice.probe().available, reason="no NVIDIA GPU here"),
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason='needs pip install "halyard[onnx-gpu]"',
    ),
]
CONTEXT = (23, 9, 41)  # tokens of the sequences; longer than a window, over several blocks


def bound(session: Any, inputs: dict[str, Any], outputs: dict[str, torch.Tensor]) -> None:
    """Run on the tensors' own memory; the caches are written in place."""
    binding = session.io_binding()
    kinds = {torch.float16: np.float16, torch.float32: np.float32, torch.int32: np.int32,
             torch.int64: np.int64}  # fmt: skip
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            kind, shape = kinds[tensor.dtype], list(tensor.shape)
            bind(name, tensor.device.type, 0, kind, shape, tensor.data_ptr())
    torch.cuda.synchronize()
    session.run_with_iobinding(binding)
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("family", "block"), [("llama", 16), ("llama", 256), ("gemma2", 16), ("gpt-oss", 256)]
)
def test_steps_of_the_export_give_hugging_face_s_logits(
    family: str, block: int, tmp_path: Path
) -> None:
    """gemma2 has softcap and windows; gpt-oss sinks, which the provider takes in large blocks only."""
    model = save_tiny_model(family, tmp_path / "model")
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    words = [str(tmp_path / "model"), "--onnx", str(tmp_path / "out"), "--dtype", "float16"]
    assert export.run(parser.parse_args([*words, "--paged-attention"])) == 0
    file = tmp_path / "out" / "model.paged_attention.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CUDAExecutionProvider"])
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    shape = next(i for i in session.get_inputs() if i.name == "key_cache_0").shape
    config = model.config
    blocks = random.Random(1).sample(range(12), 12)
    tables = [[blocks.pop() for _ in range(-(-n // block))] for n in CONTEXT]
    caches = {
        f"{kind}_cache_{n}": torch.full(
            (12, block, shape[2], shape[3]), torch.nan, dtype=torch.float16, device="cuda"
        )
        for kind in ("key", "value") for n in range(config.num_hidden_layers)
    }  # fmt: skip
    for cache in caches.values():  # a row's own unwritten places may be read and must be masked
        cache[list(set(range(12)) - {b for table in tables for b in table})] = 0
    generator = random.Random(2)
    sequences = [[generator.randrange(128) for _ in range(n)] for n in CONTEXT]
    done, got = [0, 0, 0], [[], [], []]  # type: tuple[list[int], list[list[Any]]]
    for counts in ({0: 16, 1: 8}, {0: 5, 1: 1, 2: 33}, {0: 1, 2: 1}, {0: 1, 2: 7}):
        rows = list(counts)
        flat = [(row, done[row] + n) for row in rows for n in range(counts[row])]
        starts = np.cumsum([0, *counts.values()])
        width = max(len(tables[row]) for row in rows)
        padded = [tables[row] + [-1] * (width - len(tables[row])) for row in rows]
        slots = [tables[row][p // block] * block + p % block for row, p in flat]
        feeds: dict[str, Any] = {
            "input_ids": torch.tensor([sequences[row][p] for row, p in flat]),
            "positions": torch.tensor([p for _, p in flat]),
            "logit_indices": torch.arange(len(flat)),
            "query_start": torch.tensor(starts, dtype=torch.int32),
            "past_lens": torch.tensor([done[row] for row in rows], dtype=torch.int32),
            "block_tables": torch.tensor(padded, dtype=torch.int32),
            "slot_mapping": torch.tensor(slots, dtype=torch.int32),
        }
        feeds = {name: tensor.cuda() for name, tensor in feeds.items()} | caches
        feeds["bounds"] = torch.tensor([33, 48], dtype=torch.int32)
        kind = torch.float16
        logits = torch.full((len(flat), config.vocab_size), torch.nan, dtype=kind, device="cuda")
        outputs = {name.replace("cache_", "cache_out_"): cache for name, cache in caches.items()}
        bound(session, feeds, {"logits": logits} | outputs)
        for number, row in enumerate(rows):
            done[row] += counts[row]
            got[row].append(logits[starts[number] : starts[number + 1]].float().cpu())
    with torch.no_grad():
        for row, sequence in enumerate(sequences):
            expected = model(torch.tensor([sequence[: done[row]]])).logits[0]
            errors = (torch.cat(got[row]) - expected).abs().amax(1) / expected.abs().max()
            # Where experts' choice turns over a rounding, that token and those after it are another
            # text: see test_onnx_paged_node.py.
            first = 4 if config.model_type == "gpt_oss" else len(errors)
            assert (errors[:first] < 0.02).all(), f"row {row}: {errors.tolist()}"
