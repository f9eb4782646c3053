"""The whole engine answers token for token as Hugging Face's generate, for every proven family."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_models import PROVEN, save_tiny_model, tiny_model

from halyard import LLM, SamplingParams
from halyard.hal.kernels.native.library import find_compiler

BACKENDS = ["reference"] if find_compiler() is None else ["cpu-eager"]
GREEDY = SamplingParams(temperature=0, max_tokens=14)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(128) for _ in range(length)] for length in lengths]


def expected(model: object, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        ids = model.generate(  # type: ignore[attr-defined]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),  # or it takes token 0 for padding
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", PROVEN)
def test_greedy_tokens(family: str, backend: str, tmp_path: Path) -> None:
    """Packed and chunked prompts beside decoding rows: eight tokens a step are not enough for one."""
    model = save_tiny_model(family, tmp_path)
    asked = prompts(1, 15, 16, 17, 33)
    with LLM(
        tmp_path, backend=backend, kv_blocks=32, max_num_sequences=4, max_batched_tokens=8
    ) as llm:
        outputs = llm.generate(asked, GREEDY, use_tqdm=False)
        for prompt, output in zip(asked, outputs, strict=True):
            assert output.outputs[0].token_ids == expected(model, prompt, 14)
            assert output.outputs[0].finish_reason == "length"
        llm.engine.check_integrity()
        assert llm.engine.stats().scheduler.blocks_used == 0


def test_the_reference_backend_agrees(tmp_path: Path) -> None:
    model = save_tiny_model("gemma3", tmp_path)
    (prompt,) = prompts(21)
    with LLM(tmp_path, backend="reference", kv_blocks=16, block_size=4) as llm:
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == expected(model, prompt, 14)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_a_sharded_checkpoint_is_the_same_model(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (prompt,) = prompts(9)
    with LLM(tmp_path, backend="reference", kv_blocks=16) as llm:
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == expected(model, prompt, 14)


def test_logprobs_are_the_models_own(tmp_path: Path) -> None:
    model = save_tiny_model("qwen3", tmp_path)
    (prompt,) = prompts(19)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2)
    with LLM(
        tmp_path, backend=BACKENDS[0], kv_blocks=16, max_num_sequences=4, max_batched_tokens=8
    ) as llm:
        output = llm.generate(prompt, params)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    assert output.prompt_logprobs is not None
    whole = prompt + answer.token_ids
    with torch.no_grad():
        truth = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    for position, found in enumerate([*output.prompt_logprobs[1:], *answer.logprobs], start=1):
        assert found is not None
        own = found[whole[position]]
        assert own.logprob == pytest.approx(truth[position - 1, whole[position]].item(), abs=1e-4)
        best = truth[position - 1].topk(2)
        assert {int(i) for i in best.indices} <= set(found)
    assert output.prompt_logprobs[0] is None
    assert answer.cumulative_logprob == pytest.approx(
        sum(found[t].logprob for found, t in zip(answer.logprobs, answer.token_ids, strict=True))
    )


def test_a_dummy_model_needs_only_a_config(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    answers = []
    for _ in range(2):
        with LLM(tmp_path, backend="reference", load_format="dummy", kv_blocks=8, seed=3) as llm:
            assert llm.tokenizer is None
            answers.append(llm.generate([1, 2, 3], GREEDY)[0].outputs[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].text == ""
