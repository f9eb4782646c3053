"""The engine on a real GPU: at every speed setting the greedy tokens are the reference's, grammars too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halyard.hal import fallbacks
from halyard.hal.devices.cuda import CudaDevice
from halyard.hal.devices.rocm import RocmDevice
from halyard.models.tiny import save_tiny_model
from halyard.models.unpack import unpack_fp8, unpack_mxfp4
from halyard.runtime.llm import LLM
from halyard.runtime.request import Constraint, SamplingParams

KIND = RocmDevice if torch.version.hip else CudaDevice
PROBE = KIND.probe()
BACKEND = "rocm" if torch.version.hip else "cuda"
pytestmark = pytest.mark.skipif(
    not PROBE.available, reason="no GPU here: " + "; ".join(PROBE.reasons)
)

SHARED = "import os\n\n\ndef walk(folder):\n    for name in os.listdir(folder):\n        path = "
TEXTS = [
    "import os\n\ndef ", "class Reader:\n    def ", "for name in ", "The ", "x = [", "def f(a):",
    SHARED + "os.path.", SHARED + "folder", SHARED, SHARED + "name",
]  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "in turn": {"overlap": False},
    "drawn by torch": {"device_sampling": False},
    "shared prefixes read by each": {"shared_attention": False},
    "small steps": {"max_batched_tokens": 32, "max_num_sequences": 8},
    "swapped": {"kv_blocks": 24, "host_kv_blocks": 64, "preemption": "swap", "max_model_len": 256},
    "recomputed": {"kv_blocks": 24, "host_kv_blocks": 0, "max_model_len": 256},
    "no prefix cache": {"prefix_cache": False},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def greedy(llm: LLM) -> list[Any]:
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    return [o.outputs[0].token_ids for o in llm.generate(TEXTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    with LLM("embedded", backend="reference", dtype="float32", kv_blocks=256) as llm:
        return greedy(llm)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_greedy_tokens_are_the_references(name: str, expected: list[Any]) -> None:
    options = {"kv_blocks": 256, "host_kv_blocks": 0, **SETTINGS[name]}
    with LLM("embedded", backend=BACKEND, dtype="float32", **options) as llm:
        assert greedy(llm) == expected
        assert greedy(llm) == expected  # from the prefix cache, where there is one
        llm.engine.check_integrity()
        assert llm.engine.stats().scheduler.blocks_used == 0


def test_what_is_recorded_ahead_gives_the_references_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps with prompts too, of few tokens and of thousands, filled up to what a server records."""
    monkeypatch.setattr("halyard.runtime.rehearsal._LAUNCHING", 0.0)  # large ones on any host
    prompts = [[5 + (7 * i + 13 * j + i * j) % 400 for j in range(60 + i)] for i in range(40)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM("embedded", backend="reference", dtype="float32", kv_blocks=512) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    options: dict[str, Any] = {"kv_blocks": 512, "host_kv_blocks": 0, "max_batched_tokens": 4096}
    with LLM("embedded", backend=BACKEND, dtype="float32", **options) as llm:
        while llm.engine.rehearse():
            pass
        program: Any = llm.engine.executor.program
        assert program.mixed_shape(sum(map(len, prompts)), 40, 40, 100)[0] > 2048
        for some in (slice(0, 40), slice(0, 1), slice(3, 9)):
            llm.engine.scheduler.reset()  # no cached prefix
            found = llm.generate(prompts[some], params, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in found] == expected[some]
        llm.engine.check_integrity()


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3"])
def test_mixtures_of_experts_are_recorded_and_give_the_references_tokens(
    family: str, tmp_path: Path
) -> None:
    save_tiny_model(family, tmp_path)
    prompts = [[(7 * i + 13 * j + i * j) % 128 for j in range(3 + 5 * i)] for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    options: dict[str, Any] = {"dtype": "float32", "kv_blocks": 256}
    with LLM(tmp_path, backend="reference", **options) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    before = fallbacks.counts()
    with LLM(tmp_path, backend=BACKEND, host_kv_blocks=0, **options) as llm:
        while llm.engine.rehearse():
            pass
        for some in (slice(0, 12), slice(4, 5)):
            found = llm.generate(prompts[some], params, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in found] == expected[some]
        assert llm.engine.executor.program._replays  # type: ignore[union-attr]
        llm.engine.check_integrity()
    assert fallbacks.counts() == before


def test_recordings_hold_no_logits_each() -> None:
    """What they leave lies where they all work: dozens of them are no dozens of vocabularies."""
    options: dict[str, Any] = {"kv_blocks": 512, "host_kv_blocks": 0, "max_num_sequences": 256}
    with LLM("embedded", backend=BACKEND, **options) as llm:
        engine, program = llm.engine, llm.engine.executor.program
        held = []
        while engine.rehearse():
            held.append(torch.cuda.memory_allocated())
        logits = 256 * program.vocab_size * 2
        recordings = len(program._replays)  # type: ignore[union-attr]
        assert recordings > 20
        assert max(held) - held[0] < recordings * logits / 2  # 32 MiB of cuBLAS among it
        engine.check_integrity()


@pytest.mark.parametrize("overlap", [True, False])
def test_grammars_hold_beside_free_rows(overlap: bool) -> None:
    """Half of the rows are guided: masks reach the rows that they are for."""
    guided = SamplingParams(
        temperature=1.0, seed=5, max_tokens=200, guided=Constraint.json_schema(SCHEMA)
    )
    choice = SamplingParams(
        temperature=1.0, seed=6, max_tokens=20, guided=Constraint.choice(["red", "green"])
    )
    free = SamplingParams(temperature=0, max_tokens=40)
    with LLM("embedded", backend=BACKEND, kv_blocks=512, overlap=overlap) as llm:
        alone = [o.outputs[0].token_ids for o in llm.generate(TEXTS[:4], free, use_tqdm=False)]
        asked = [guided, free, choice, free, guided, free, choice, free]
        texts = [TEXTS[4], TEXTS[0], TEXTS[4], TEXTS[1], TEXTS[5], TEXTS[2], TEXTS[5], TEXTS[3]]
        answers = [o.outputs[0] for o in llm.generate(texts, asked, use_tqdm=False)]
    for answer in (answers[0], answers[4]):
        assert answer.finish_reason == "stop"
        assert set(json.loads(answer.text)) == {"name", "age"}
    assert {answers[2].text, answers[6].text} <= {"red", "green"}
    same = sum(answers[2 * n + 1].token_ids == alone[n] for n in range(4))
    assert same >= 3  # in bf16 a tie may break another way beside other rows


def test_a_closed_engine_leaves_the_memory_to_the_next() -> None:
    """Also while somebody still holds it: two models, one after the other, in one process."""
    before = torch.cuda.memory_allocated()
    llm = LLM("embedded", backend=BACKEND, kv_blocks=65536, host_kv_blocks=64)
    llm.generate(TEXTS[:4], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    held = torch.cuda.memory_allocated() - before
    llm.close()
    left = torch.cuda.memory_allocated() - before
    assert left < held / 20, f"{left} of {held} bytes are left"


def test_packed_weights_are_unpacked_on_the_device() -> None:
    blocks = torch.randint(0, 256, (3, 40, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 40, 5), dtype=torch.uint8)
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    factors = torch.rand(2, 3) + 0.5
    for unpack, parts in ((unpack_mxfp4, (blocks, scales)), (unpack_fp8, (weight, factors))):
        want = unpack(*parts, torch.bfloat16)
        found = unpack(*(part.cuda() for part in parts), torch.bfloat16)
        assert found.is_cuda
        assert torch.equal(found.cpu(), want)
