"""Overlap on a real model: sampling, penalties, grammars, scores and stop strings stay what they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halyard import LLM, SamplingParams
from halyard.hal.kernels.native.library import find_compiler
from halyard.runtime.request import Constraint
from halyard.runtime.sampler import Sampler

sys.path.insert(0, str(Path(__file__).parents[1] / "null"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from late_executor import make_late
from plain_drawing import PlainDrawing

BACKEND = "reference" if find_compiler() is None else "cpu-eager"
TEXTS = [
    "import os\n\ndef ",
    "class Reader:\n    def ",
    "for name in ",
    "The ",
    "x = [",
    "def f(a):",
    "{",
    "The colour is ",
    "import os\n\nfor name in os.",
]


def params() -> list[SamplingParams]:
    """One a text; each asks for something else."""
    schema = Constraint("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}',
                        "response_format")  # fmt: skip
    return [
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=18, repetition_penalty=1.3,
                       presence_penalty=0.5),
        SamplingParams(temperature=0.8, top_k=20, seed=4, max_tokens=15, n=2, logprobs=2),
        SamplingParams(temperature=0, max_tokens=16, stop=["e"], frequency_penalty=0.4),
        SamplingParams(temperature=0, max_tokens=12, guided=schema),
        SamplingParams(temperature=1.0, seed=9, max_tokens=14, min_tokens=14, min_p=0.05,
                       logit_bias={11: 2.0}),
        SamplingParams(temperature=1.0, seed=5, max_tokens=40, guided_finish=True, guided=schema,
                       repetition_penalty=1.1, logprobs=1),
        SamplingParams(temperature=1.0, seed=6, max_tokens=9, n=2,
                       guided=Constraint.choice(["red", "green", "greener"])),
        SamplingParams(temperature=0, max_tokens=7, prompt_logprobs=2),
    ]  # fmt: skip


def told(outputs: Any) -> list[Any]:
    return [
        (answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason, answer.logprobs,
         output.prompt_logprobs)
        for output in outputs
        for answer in output.outputs
    ]  # fmt: skip


@pytest.mark.parametrize("kernels", [False, True], ids=["torch draws", "kernels draw"])
@pytest.mark.parametrize("blocks", [14, 64])
def test_overlap_changes_no_answer(blocks: int, kernels: bool) -> None:
    """Penalised rows continue tokens that the host has not seen; guided ones are computed meanwhile, and
    drawn when it has. With few blocks some of them are put off, too."""
    texts, asked = TEXTS, params()
    options: dict[str, Any] = {"kv_blocks": blocks, "max_model_len": 128, "host_kv_blocks": 16}
    with LLM("embedded", backend=BACKEND, **options) as llm:
        expected = told(llm.generate(texts, asked))
        if kernels:
            vocab = llm.engine.executor.program.vocab_size
            llm.engine.executor.sampler = Sampler(vocab, kernels=PlainDrawing())
            expected = told(llm.generate(texts, asked))
        late = make_late(llm)
        assert told(llm.generate(texts, asked)) == expected
        assert late.issued_behind > late.issued / 2
        llm.engine.check_integrity()
        assert llm.engine.stats().scheduler.blocks_used == 0


def test_a_guided_step_that_does_not_fit_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out when it is drawn: it was issued before that, and another is in flight."""
    texts, asked = TEXTS, params()
    with LLM("embedded", backend=BACKEND, kv_blocks=64, max_model_len=128) as llm:
        expected = told(llm.generate(texts, asked))
        make_late(llm)
        sampler, calls = llm.engine.executor.sampler, []
        complete = sampler.complete

        def short(draw: Any) -> Any:
            calls.append(draw)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return complete(draw)

        monkeypatch.setattr(sampler, "complete", short)
        # Tokens: what is computed again, in other batches, has the last bits of its scores otherwise.
        assert [one[:4] for one in told(llm.generate(texts, asked))] == [
            one[:4] for one in expected
        ]
        assert len(calls) > 3
        llm.engine.check_integrity()
        assert llm.engine.stats().scheduler.blocks_used == 0
