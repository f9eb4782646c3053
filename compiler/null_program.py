"""A program that computes nothing: logits that name one token, so that answers are predictable."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from halyard.hal.types import KVPool, StepBatch

__all__ = ["NullProgram"]

STEP_MS = "HALYARD_NULL_STEP_MS"  # environment variable: a step takes that long, as on a device


class NullProgram:
    """Stands in for compiler.program.Program on the null backend."""

    weight_bytes = 0

    def __init__(self, vocab_size: int, hidden_size: int = 4) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self._step_seconds = float(os.environ.get(STEP_MS, "0")) / 1e3
        self._free = 0.0  # time.monotonic() when the step before was done

    def set_pool(self, pool: KVPool) -> None:
        return None

    def move_weights(self, device: torch.device) -> None:
        return None

    def run(self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch) -> Tensor:
        """Logits [rows, vocab] whose largest is the input token plus one."""
        if self._step_seconds:
            self._wait()
        logits = torch.zeros(logit_indices.shape[0], self.vocab_size)
        following = (input_ids[logit_indices] + 1) % self.vocab_size
        logits[torch.arange(logit_indices.shape[0]), following] = 1.0
        return logits

    def run_with_hidden(
        self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch
    ) -> tuple[Tensor, Tensor]:
        """As `run`; hidden states [tokens, hidden] are powers of the token id plus one, scaled."""
        base = (input_ids + 1).float() / self.vocab_size
        hidden = base[:, None] ** torch.arange(self.hidden_size)
        return self.run(input_ids, logit_indices, batch), hidden

    def _wait(self) -> None:
        """As behind a device that is never without work: the host's part costs it no time."""
        now = time.monotonic()
        self._free = max(self._free, now - self._step_seconds) + self._step_seconds
        time.sleep(max(0.0, self._free - now))
