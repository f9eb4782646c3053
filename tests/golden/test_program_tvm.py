"""Segments compiled by TVM answer as Hugging Face does, at every size of batch."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program_checks import bind, check
from tiny_models import save_tiny_model
from tiny_programs import build_tiny

from halyard.compiler.cache import ArtefactCache, load_or_build
from halyard.compiler.graphs.tvm import TvmCompiler
from halyard.compiler.program import UnboundProgram
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.errors import BackendUnavailableError, ModelError

pytest.importorskip("tvm", reason='needs pip install "halyard[tvm]"')

DEVICE = CpuDevice()
COMPILER = TvmCompiler()


def build(family: str, dtype: Any = "float32") -> UnboundProgram:
    return build_tiny(family, COMPILER, dtype)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])  # the suite has all: minutes
def test_logits(family: str) -> None:
    check(*bind(family, build(family)))


def test_kept_segments_run_again(tmp_path: Path) -> None:
    cache = ArtefactCache(tmp_path)
    facts = {"model": "llama", "dtype": "float32"}
    fresh = load_or_build(cache, facts, lambda: build("llama"), COMPILER, DEVICE.info)
    assert not fresh.from_cache
    key = cache.key(facts, COMPILER, DEVICE.info)
    again = cache.load(key, COMPILER, DEVICE.info)
    assert again is not None
    assert again.from_cache
    check(*bind("llama", again))


def test_inputs_that_begin_anywhere(tmp_path: Path) -> None:
    """In a process of its own: generated loops would end it."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        "import torch\n"
        "from test_program_tvm import bind, build, check\n"
        "program = build('llama')\n"
        "def moved(tensor):\n"
        "    raw = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)\n"
        "    start = next(n for n in range(16) if raw[n:].data_ptr() % 64 == 8)\n"
        "    return raw[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)\n"
        "program.constants.update({n: moved(t) for n, t in program.constants.items()})\n"
        "check(*bind('llama', program))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_bfloat16_is_refused_in_one_line() -> None:
    with pytest.raises(BackendUnavailableError, match="not in bfloat16: use --dtype") as caught:
        build("llama", "bfloat16")
    assert "\n" not in str(caught.value)


def test_unknown_operators_are_named() -> None:
    with pytest.raises(ModelError, match=r"can't hold the operator aten\.\w+") as caught:
        build("mixtral")
    assert "\n" not in str(caught.value)


def test_other_devices_are_refused() -> None:
    rocm = dataclasses.replace(DEVICE.info, kind="rocm")
    (reason,) = COMPILER.probe(rocm).reasons
    assert reason == "the tvm graph compiler runs on the cpu, not on rocm"


MATRIX = """
backends:
  - {name: reference, device: cpu, kernels: reference, graph: eager, dtypes: [float32],
     status: untested, role: test}
  - {name: tvm, device: cpu, kernels: tvm, graph: tvm, dtypes: [float32],
     status: untested, role: test}
select: [reference]
pools: []
"""


def test_greedy_engine(tmp_path: Path) -> None:
    from halyard import LLM, SamplingParams

    save_tiny_model("qwen3", tmp_path)
    generator = random.Random(0)
    prompts = [[generator.randrange(128) for _ in range(n)] for n in (1, 15, 17, 33)]
    params = SamplingParams(temperature=0, max_tokens=6)
    answers = {}
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(MATRIX)
    for backend in ("reference", "tvm"):
        with LLM(
            tmp_path, backend=backend, dtype="float32", kv_blocks=32, max_batched_tokens=8,
            max_num_sequences=4, cache_dir=tmp_path / "cache", matrix=matrix,
        ) as llm:  # fmt: skip
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers[backend] = [output.outputs[0].token_ids for output in outputs]
    assert answers["tvm"] == answers["reference"]
