"""Embeddings are Hugging Face's final hidden states, pooled: over chunks, beside answers, after evictions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model

from halyard import LLM, SamplingParams
from halyard.hal.kernels.native.library import find_compiler
from halyard.models.source import resolve_source

BACKENDS = ["reference"] if find_compiler() is None else ["cpu-eager"]


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(128) for _ in range(length)] for length in lengths]


def expected(model: Any, prompt: list[int], pooling: str) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0].double()
    vector = hidden[-1] if pooling == "last" else hidden.mean(0)
    return vector / vector.norm()


def check(llm: LLM, model: Any, asked: list[list[int]], atol: float) -> None:
    for pooling in ("last", "mean"):
        outputs = llm.embed(asked, pooling=pooling, use_tqdm=False)  # type: ignore[arg-type]
        for prompt, output in zip(asked, outputs, strict=True):
            found = torch.tensor(output.outputs.embedding, dtype=torch.float64)
            torch.testing.assert_close(found, expected(model, prompt, pooling), atol=atol, rtol=0)
            assert output.prompt_token_ids == prompt
    llm.engine.check_integrity()
    assert llm.engine.stats().scheduler.blocks_used == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "phi3", "mixtral", "gpt-oss"])
def test_in_chunks(family: str, backend: str, tmp_path: Path) -> None:
    """Eight tokens a step: long prompts take several, short ones share one."""
    model = save_tiny_model(family, tmp_path)
    with LLM(
        tmp_path, backend=backend, kv_blocks=32, max_num_sequences=4, max_batched_tokens=8
    ) as llm:
        check(llm, model, prompts(1, 15, 16, 17, 33), 1e-5)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_beside_answers_that_crowd_them_out(preemption: str, tmp_path: Path) -> None:
    """Blocks run out while a mean is half done: it goes on, or begins again."""
    model = save_tiny_model("llama", tmp_path)
    options: dict[str, Any] = {"host_kv_blocks": 20 if preemption == "swap" else 0}
    with LLM(
        tmp_path, backend=BACKENDS[0], kv_blocks=13, max_model_len=192, max_num_sequences=8,
        max_batched_tokens=8, preemption=preemption, **options,
    ) as llm:  # fmt: skip
        engine, intake = llm.engine, llm.engine.intake
        asked = prompts(100, 90, seed=3)
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        for prompt in prompts(20, 24, 28, seed=4):
            engine.add(intake.request(prompt, params))
        pooled = [intake.pooled_request(prompt, "mean") for prompt in asked]
        for request in pooled:
            engine.add(request)
        found: dict[str, bytes] = {}
        while engine.has_work():
            for event in engine.step():
                if event.embedding is not None:
                    found[event.request_id] = event.embedding
            engine.check_integrity()
        stats = engine.stats().scheduler
        assert stats.preemptions_swap + stats.preemptions_recompute > 0
        for request, prompt in zip(pooled, asked, strict=True):
            vector = torch.frombuffer(
                bytearray(found[request.request_id]), dtype=torch.float32
            ).double()
            wanted = expected(model, prompt, "mean")
            torch.testing.assert_close(vector / vector.norm(), wanted, atol=1e-5, rtol=0)


def test_prefix_cache_hits_change_nothing(tmp_path: Path) -> None:
    """A mean needs every token computed; the last token's state may stand on cached blocks."""
    model = save_tiny_model("qwen3", tmp_path)
    (prompt,) = prompts(50, seed=5)
    with LLM(tmp_path, backend=BACKENDS[0], kv_blocks=32) as llm:
        for _ in range(2):
            check(llm, model, [prompt], 1e-5)
        assert llm.embed([prompt], "last")[0].num_cached_tokens == 48
        assert llm.embed([prompt], "mean")[0].num_cached_tokens == 0
        # What embedding left in the cache serves answers, and the other way round.
        answer = llm.generate([prompt], SamplingParams(max_tokens=1))[0]
        assert answer.num_cached_tokens == 48


def test_the_model_that_ships_on_the_default_backend() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        resolve_source("embedded").path, dtype=torch.float32
    ).eval()
    with LLM("embedded", kv_blocks=96, max_num_sequences=8, max_batched_tokens=64) as llm:
        assert llm.tokenizer is not None
        texts = ["import os\n", "def fibonacci(n):\n    if n < 2:\n        return n\n" * 8]
        asked = [llm.tokenizer.encode(text) for text in texts]
        assert len(asked[1]) > 64
        check(llm, model, asked, 1e-4 if llm.plan.dtype == "float32" else 2e-2)


def test_dimensions_and_length(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path)
    (prompt,) = prompts(9)
    with LLM(tmp_path, backend=BACKENDS[0], kv_blocks=16) as llm:
        raw = torch.tensor(llm.embed(prompt, "mean", normalize=False)[0].outputs.embedding)
        with torch.no_grad():
            truth = model.base_model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(raw, truth, atol=1e-5, rtol=1e-5)
        cut = torch.tensor(llm.embed(prompt, "mean", dimensions=7)[0].outputs.embedding)
        torch.testing.assert_close(cut, raw[:7] / raw[:7].norm(), atol=1e-6, rtol=1e-6)
