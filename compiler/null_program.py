"""A program that computes nothing: logits that name one token, so that answers are predictable."""

from __future__ import annotations

import torch
from torch import Tensor

from halyard.hal.types import KVPool, StepBatch

__all__ = ["NullProgram"]


class NullProgram:
    """Stands in for compiler.program.Program on the null backend."""

    weight_bytes = 0

    def __init__(self, vocab_size: int, hidden_size: int = 4) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size

    def set_pool(self, pool: KVPool) -> None:
        return None

    def move_weights(self, device: torch.device) -> None:
        return None

    def run(self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch) -> Tensor:
        """Logits [rows, vocab] whose largest is the input token plus one."""
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
