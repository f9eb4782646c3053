"""A program that computes nothing: logits that name one token, so that answers are predictable."""

from __future__ import annotations

import torch
from torch import Tensor

from halyard.hal.types import KVPool, StepBatch

__all__ = ["NullProgram"]


class NullProgram:
    """Stands in for compiler.program.Program on the null backend."""

    weight_bytes = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def set_pool(self, pool: KVPool) -> None:
        return None

    def run(self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch) -> Tensor:
        """Logits [rows, vocab] whose largest is the input token plus one."""
        logits = torch.zeros(logit_indices.shape[0], self.vocab_size)
        following = (input_ids[logit_indices] + 1) % self.vocab_size
        logits[torch.arange(logit_indices.shape[0]), following] = 1.0
        return logits
