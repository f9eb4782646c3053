"""ONNX segments answer as Hugging Face does, at every size of batch, fresh and from the cache."""

from __future__ import annotations

import dataclasses
import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from program_checks import bind, check
from test_program_matches_hf import Batch
from tiny_models import PROVEN, save_tiny_model
from tiny_programs import build_tiny

from halyard.compiler.cache import ArtefactCache, load_or_build
from halyard.compiler.graphs.onnxruntime import OnnxRuntimeCompiler
from halyard.compiler.program import Program, UnboundProgram
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.errors import BackendUnavailableError, ModelError

pytest.importorskip("onnx", reason='needs pip install "halyard[onnx]"')
pytest.importorskip("onnxruntime", reason='needs pip install "halyard[onnx]"')

DEVICE = CpuDevice()
COMPILER = OnnxRuntimeCompiler()
CASES: dict[str, tuple[Any, Program]] = {}


def build(family: str, dtype: Any = "float32") -> UnboundProgram:
    return build_tiny(family, COMPILER, dtype)


def case(family: str) -> tuple[Any, Program]:
    if family not in CASES:
        CASES[family] = bind(family, build(family))
    return CASES[family]


@pytest.mark.parametrize("family", [*PROVEN, "gpt-oss", "rope-yarn"])
def test_logits(family: str) -> None:
    check(*case(family))


def test_prompt_of_one_token() -> None:
    model, program = case("llama")
    batch = Batch([[5, 6]])
    found = torch.cat([batch.step(program, {0: 1})[0] for _ in range(2)])
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]])).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_cached_program_answers_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ArtefactCache(tmp_path)

    def obtain() -> UnboundProgram:
        facts = {"model": "mixtral", "dtype": "float32"}
        return load_or_build(cache, facts, lambda: build("mixtral"), COMPILER, DEVICE.info)

    assert not obtain().from_cache
    monkeypatch.setattr(OnnxRuntimeCompiler, "compile", None)
    again = obtain()
    assert again.from_cache
    check(*bind("mixtral", again))
    (entry,) = (path for path in cache.directory.iterdir() if path.is_dir())
    size = sum(file.stat().st_size for file in entry.rglob("model.onnx"))
    assert 0 < size < 200_000  # no weights in it
    (entry / "segment-1" / "model.onnx").write_bytes(b"cut short")
    assert cache.load(entry.name, COMPILER, DEVICE.info) is None


def test_two_sets_of_weights_on_one_program() -> None:
    """Weights are bound by identity: another model's must not be taken for them, nor outlive it."""
    unbound = build("llama")
    first, second = bind("llama", unbound), bind("llama", unbound, seed=1)
    check(*first)
    check(*second)
    check(*first)
    bindings = sum(len(run._bindings) for run in unbound.executables)  # type: ignore[attr-defined]
    assert bindings == 2 * 4  # a model of three layers has four segments
    del first, second
    gc.collect()
    assert not any(run._bindings for run in unbound.executables)  # type: ignore[attr-defined]


def test_bfloat16_is_refused_in_one_line() -> None:
    with pytest.raises(BackendUnavailableError, match="not in bfloat16: use --dtype") as caught:
        build("llama", "bfloat16")
    assert "\n" not in str(caught.value)


def test_other_devices_are_refused() -> None:
    rocm = dataclasses.replace(DEVICE.info, kind="rocm")
    assert COMPILER.probe(rocm).reasons == ("onnxruntime runs on cpu and cuda here, not on rocm",)
    cuda = dataclasses.replace(DEVICE.info, kind="cuda")
    if not torch.cuda.is_available():
        (reason,) = COMPILER.probe(cuda).reasons
        assert 'pip install "halyard[onnx-gpu]"' in reason


def test_unknown_operators_are_named() -> None:
    with pytest.raises(ModelError, match=r"can't hold the operator aten\.\w+") as caught:
        build("deepseek-v3")
    assert "\n" not in str(caught.value)


MATRIX = """
backends:
  - {name: reference, device: cpu, kernels: reference, graph: eager, dtypes: [float32],
     status: untested, role: test}
  - {name: onnx, device: cpu, kernels: reference, graph: onnxruntime, dtypes: [float32],
     status: untested, role: test}
select: [reference]
pools: []
"""


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_greedy_engine(family: str, tmp_path: Path) -> None:
    from halyard import LLM, SamplingParams

    save_tiny_model(family, tmp_path)
    generator = random.Random(0)
    prompts = [[generator.randrange(128) for _ in range(n)] for n in (1, 15, 16, 17, 33)]
    params = SamplingParams(temperature=0, max_tokens=8)
    answers = {}
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(MATRIX)
    for backend in ("reference", "onnx"):
        with LLM(
            tmp_path, backend=backend, dtype="float32", kv_blocks=32, max_batched_tokens=8,
            max_num_sequences=4, cache_dir=tmp_path / "cache", matrix=matrix,
        ) as llm:  # fmt: skip
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers[backend] = [output.outputs[0].token_ids for output in outputs]
    assert answers["onnx"] == answers["reference"]
