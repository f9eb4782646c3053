"""From logits to launches of the drawing kernels: how many programs share a row, and of which size."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from halyard.hal.contract import Device

__all__ = ["DrawLauncher"]


class DrawLauncher:
    """Draws on one device's current stream; owns the workspace of rows that programs share."""

    def __init__(self, device: Device) -> None:
        self._cores = device.info.num_cores
        self._kernels: Any = importlib.import_module("halyard.hal.kernels.triton.draw")
        self._change: Any = importlib.import_module("halyard.hal.kernels.triton.change")
        self._parts: Tensor | None = None
        self._tickets: Tensor | None = None
        self._outgrown: list[Tensor] = []  # captured steps still write to them
        self.pieces: int | None = None  # of a greedy row; None: by shape (benchmarks, tests)

    def draw(
        self, logits: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As DrawingKernels.draw."""
        num = len(rows) if rows is not None else len(logits)
        if rows is None and columns is not None:
            num = columns.shape[1]
        tokens, codes = torch.empty((2, num), dtype=torch.int64, device=logits.device)
        bad = torch.empty(num, dtype=torch.int8, device=logits.device)
        if num and columns is None:
            self._greedy(logits, rows, tokens, codes, bad)
        elif num:
            few, most = num <= self._cores, self._kernels.CANDIDATES
            scratch = torch.empty(num * most, dtype=torch.int32, device=logits.device)
            self._kernels.draw_kernel[(num,)](
                logits, tokens if rows is None else rows, columns, tokens, codes, bad, scratch,
                logits.shape[-1], logits.stride(0), num, GATHER=rows is not None, MOST=most,
                SIZE=self._kernels.FEW_ROWS_RANDOM_CHUNK if few else self._kernels.RANDOM_CHUNK,
                num_warps=16 if few else 8,
            )  # fmt: skip
        return tokens, bad.view(torch.bool), codes

    def change(
        self,
        logits: Tensor,
        rows: Tensor,
        penalties: Tensor,
        slots: Tensor,
        counts: tuple[Tensor, Tensor] | None,
        masks: Tensor,
        allowed: Tensor | None,
    ) -> Tensor:
        """As ChangingKernels.change."""
        num, vocab = len(rows), logits.shape[-1]
        out = torch.empty((num, vocab), dtype=torch.float32, device=logits.device)
        # Where no row has counts or a mask, nobody reads what is passed in their place.
        if counts is None:
            counts = rows.view(torch.bool), penalties
        words = allowed.shape[1] if allowed is not None else 0
        if allowed is None:
            allowed = rows.view(torch.int32)
        size = self._change.CHUNK
        if num:
            self._change.change_kernel[(num, -(-vocab // size))](
                logits, rows, out, penalties, slots, counts[0].view(torch.int8), counts[1], masks,
                allowed, vocab, logits.stride(0), words, num, SIZE=size, num_warps=8,
            )  # fmt: skip
        return out

    def split(self, num: int, vocab: int) -> tuple[int, int]:
        """(pieces of a greedy row, tokens of a piece): from shapes alone."""
        chunk = self._kernels.CHUNK
        chunks = -(-vocab // chunk)
        # Few different numbers: each is a kernel of its own. Measured on an H100: 32, 8, 1.
        room = self._cores // num
        wanted = self.pieces or (32 if room >= 32 else 8 if room else 1)
        piece = -(-chunks // min(wanted, chunks))
        return -(-chunks // piece), piece * chunk

    def _greedy(
        self, logits: Tensor, rows: Tensor | None, tokens: Tensor, codes: Tensor, bad: Tensor
    ) -> None:
        num, vocab = len(tokens), logits.shape[-1]
        pieces, piece = self.split(num, vocab)
        parts, tickets = tokens, tokens
        if pieces > 1:
            parts, tickets = self._take_workspace(num, pieces, logits.device)
        self._kernels.draw_greedy_kernel[(num, pieces)](
            logits, tokens if rows is None else rows, tokens, codes, bad, parts, tickets,
            vocab, logits.stride(0), piece, GATHER=rows is not None, SIZE=self._kernels.CHUNK,
            PIECES=pieces, PIECES_PAD=1 << (pieces - 1).bit_length(), num_warps=8,
        )  # fmt: skip

    def _take_workspace(self, num: int, pieces: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 parts [num, 2, pieces] and int32 tickets [num], which every launch leaves at zero."""
        size = 2 * num * pieces
        if self._parts is None or self._parts.numel() < size:
            if self._parts is not None:
                self._outgrown.append(self._parts)
            self._parts = torch.empty(max(size, 4096), dtype=torch.int32, device=device)
        if self._tickets is None or self._tickets.numel() < num:
            if self._tickets is not None:
                self._outgrown.append(self._tickets)
            self._tickets = torch.zeros(max(num, 256), dtype=torch.int32, device=device)
        return self._parts, self._tickets
