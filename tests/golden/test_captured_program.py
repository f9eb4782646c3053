"""Recorded decode steps, on a device that records by running again: the same tokens, in one buffer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from torch import Tensor

from halyard import LLM, SamplingParams
from halyard.compiler.captured import CapturedProgram
from halyard.hal.kernels.native.library import find_compiler
from halyard.runtime.batcher import Batcher

sys.path.insert(0, str(Path(__file__).parents[1] / "null"))
from late_executor import make_late

BACKEND = "reference" if find_compiler() is None else "cpu-eager"


class _Recorder:
    """A device whose replay runs the step again."""

    torch_device = torch.device("cpu")

    def __init__(self, able: bool = True) -> None:
        self.able = able
        self.replayed = 0
        self.recorded = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None] | None:
        if not self.able:
            return None
        self.recorded += 1
        step()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


class _InPlace:
    """A program whose logits lie where they lay before, as a recording's do."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, *inputs: Any) -> Tensor:
        logits = self._inner.run(*inputs)
        kept = self._logits.setdefault(tuple(logits.shape), torch.empty_like(logits))
        return kept.copy_(logits)


@pytest.mark.parametrize(
    ("able", "with_prompts"), [(True, False), (False, False), (True, True), (False, True)]
)
def test_recorded_steps_give_the_same_tokens(
    tmp_path: Path, able: bool, with_prompts: bool
) -> None:
    save_tiny_model("llama", tmp_path)
    prompts = [[1 + i, 5, 9, 40 + i] * (1 + i) for i in range(7)]
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=6 + 3 * i,
                       ignore_eos=True, frequency_penalty=0.5 * (i == 4))
        for i in range(7)
    ]  # fmt: skip
    options: dict[str, Any] = {
        "kv_blocks": 64,
        "prefix_cache": False,
        "max_num_sequences": 8,
        "max_model_len": 128,
    }
    with LLM(tmp_path, backend=BACKEND, **options) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
        executor, recorder = llm.engine.executor, _Recorder(able)
        program: Any = _InPlace(executor.program)
        captured = CapturedProgram(program, recorder, 8, 8, 16)  # type: ignore[arg-type]
        captured.set_pool(executor.pool)
        executor.program = captured
        mixed = captured.mixed_shape if with_prompts else None
        executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer, mixed=mixed)
        for turn in range(4):
            if turn == 2:
                make_late(llm)
            found = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
            assert found == expected
        assert (recorder.replayed > 20) == able
        assert recorder.recorded >= 3 if able else recorder.recorded == 0
        assert (captured.num_mixed > 0) == (able and with_prompts)
        llm.engine.check_integrity()
