"""longrope: a context has one set of rotary frequencies, the long ones where it is longer than what the model
was trained with. Hugging Face's code goes by a batch's longest sequence, so each set has its lengths."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from halyard import LLM, SamplingParams
from halyard.models.tiny import FAMILIES, tiny_model

TRAINED = 48
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": TRAINED,
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [2.0 + 0.5 * n for n in range(8)],
}
ANSWER = 6


@cache
def long_rope_model() -> Any:
    sizes = {"hidden_size": 64, "original_max_position_embeddings": TRAINED}
    FAMILIES["phi3-long"] = ("Phi3Config", sizes | {"rope_parameters": ROPE})
    try:
        return tiny_model("phi3-long")
    finally:
        del FAMILIES["phi3-long"]


def greedy(prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(ANSWER):
            logits = long_rope_model()(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("context", "lengths"),
    [(TRAINED, (3, 17, TRAINED - ANSWER)), (200, (TRAINED + 1, 120)), (None, (TRAINED + 1, 120))],
)
def test_each_context_has_its_frequencies(
    tmp_path: Path, context: int | None, lengths: tuple[int, ...]
) -> None:
    long_rope_model().save_pretrained(tmp_path)
    prompts = [[(7 * n + length) % 128 for n in range(length)] for length in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    options: dict[str, Any] = {"backend": "cpu-eager", "dtype": "float32", "kv_blocks": 64}
    with LLM(
        tmp_path, max_model_len=context, max_batched_tokens=50, max_num_sequences=8, **options
    ) as llm:
        assert llm.plan.spec.trained_len == TRAINED
        found = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params)]
    assert found == [greedy(prompt) for prompt in prompts]


def test_a_long_context_is_another_program(tmp_path: Path) -> None:
    """The same prompt, in turns: what is kept of one context must not serve the other."""
    long_rope_model().save_pretrained(tmp_path)
    prompt = [(11 * n) % 128 for n in range(30)]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True, logprobs=1)
    told = []
    for context in (TRAINED, 200, TRAINED, 200):
        with LLM(tmp_path, backend="cpu-eager", dtype="float32", kv_blocks=64,
                 max_model_len=context) as llm:  # fmt: skip
            (output,) = llm.generate([prompt], params)
            told.append(output.outputs[0].cumulative_logprob)
    assert told[0] == told[2]
    assert told[1] == told[3]
    assert abs(told[0] - told[1]) > 1e-3
