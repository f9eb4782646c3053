"""Sequences in a paged pool: random contents, permuted blocks, every unused slot poisoned with NaN,
and so what block tables name behind a row's own blocks.

A `Sequences` drives a kernel set through the contract, step by step, and compares each step with
the oracle. All inputs are drawn on the host from a seed, so two of them with the same seed differ
only in what the test changes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from halyard.hal.conformance import oracle
from halyard.hal.conformance.case import CaseContext
from halyard.hal.conformance.tolerances import limit_for
from halyard.hal.contract import WritingKernels
from halyard.hal.dtypes import torch_dtype
from halyard.hal.types import AttentionLayer, KVPool, KVSpec, StepBatch

__all__ = ["Sequences"]

_SPARE_BLOCKS = 3  # blocks that no sequence owns: they must stay as they were


class Sequences:
    """Rows of given lengths, none computed yet.

    Args:
        lengths: tokens that each sequence will have at most.
        order: "permuted" hands blocks out at random, "identity" in order.
        gain: scale of queries; large ones make the softmax sharp.
        layer: window, softcap and sinks (True) of the attention.
    """

    def __init__(
        self,
        context: CaseContext,
        lengths: Sequence[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 64,
        block: int = 16,
        layers: int = 2,
        layer_index: int | None = None,
        order: str = "permuted",
        gain: float = 1.0,
        seed: int = 0,
        **layer: Any,
    ) -> None:
        self.context, self.block, self.lengths = context, block, list(lengths)
        self.kernels, self.device = context.kernels, context.device
        self.dtype = torch_dtype(context.dtype)
        spec = KVSpec(layers, kv_heads, dim, context.dtype, block)
        counts = [-(-n // block) for n in lengths]
        total = sum(counts) + _SPARE_BLOCKS
        self.pool: KVPool = self.device.allocate_kv(self.kernels.layout(spec), total, host=False)
        self.pool.data.fill_(float("nan"))
        ids = list(range(total))
        if order == "permuted":
            random.Random(seed).shuffle(ids)
        self.tables = [[ids.pop(0) for _ in range(count)] for count in counts]
        self._spare = ids  # of no sequence
        self.done = [0] * len(lengths)
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int, h: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(count, h, dim, generator=generator) * scale).to(self.dtype)

        self.q = [draw(n, heads, gain) for n in lengths]
        self.k = [draw(n, kv_heads) for n in lengths]
        self.v = [draw(n, kv_heads) for n in lengths]
        sinks = None
        if layer.pop("sinks", False):
            sinks = torch.randn(heads, generator=generator).to(self.device.torch_device)
        self.layer = AttentionLayer(
            index=layers - 1 if layer_index is None else layer_index,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            scale=dim**-0.5,
            sinks=sinks,
            **layer,
        )

    def step(
        self, counts: Sequence[int], *, check: bool = True, write: bool = True
    ) -> list[Tensor]:
        """Compute `counts[i]` more tokens of sequence i; the outputs of each row, on the host.

        Args:
            check: compare with the oracle, and look for writes where none belong.
            write: False gives slot -1 to every token.
        """
        rows = [i for i, count in enumerate(counts) if count]
        spans = [(self.done[i], self.done[i] + counts[i]) for i in rows]
        batch = self.batch(rows, spans, write)
        q, k, v = (self.packed(x, rows, spans) for x in (self.q, self.k, self.v))
        found = self.kernels.attend(q, k, v, self.pool, self.layer, batch)
        self.device.synchronize()
        require = self.context.require
        require(found.dtype == self.dtype, f"the output is {found.dtype}, not {self.dtype}")
        require(tuple(found.shape) == tuple(q.shape), f"the output's shape is {list(found.shape)}")
        require(found.is_contiguous(), "the output is not contiguous")
        host = found.cpu()
        starts = batch.query_start.tolist()
        parts = [host[starts[n] : starts[n + 1]] for n in range(len(rows))]
        for row, (_, last) in zip(rows, spans, strict=True):
            self.done[row] = last
        if check:
            for row, (first, last), part in zip(rows, spans, parts, strict=True):
                self._compare(row, first, last, part)
        return parts

    def write(self, counts: Sequence[int]) -> None:
        """Keys and values of `counts[i]` more tokens of sequence i, without an attention."""
        rows = [i for i, count in enumerate(counts) if count]
        spans = [(self.done[i], self.done[i] + counts[i]) for i in rows]
        k, v = (self.packed(x, rows, spans) for x in (self.k, self.v))
        kernels = cast(WritingKernels, self.kernels)
        kernels.write(k, v, self.pool, self.layer, self.batch(rows, spans))
        for row, (_, last) in zip(rows, spans, strict=True):
            self.done[row] = last

    def batch(
        self, rows: Sequence[int], spans: Sequence[tuple[int, int]], write: bool = True
    ) -> StepBatch:
        """The packed batch of a step, on the device."""
        slots: list[int] = []
        positions: list[int] = []
        starts = [0]
        for row, (first, last) in zip(rows, spans, strict=True):
            starts.append(starts[-1] + last - first)
            positions += range(first, last)
            table, size = self.tables[row], self.block
            slots += [
                table[p // size] * size + p % size if write else -1 for p in range(first, last)
            ]
        used = [-(-last // self.block) for _, last in spans]
        # Behind a row's own blocks a table names any others: those here hold nothing but NaN.
        width = max(used) + len(self._spare)
        tables = [
            self.tables[row][:count] + (self._spare * width)[: width - count]
            for row, count in zip(rows, used, strict=True)
        ]

        def put(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device.torch_device)

        return StepBatch(
            num_tokens=len(slots),
            num_rows=len(rows),
            max_query_len=max(last - first for first, last in spans),
            max_seq_len=max(last for _, last in spans),
            positions=put(positions, torch.int64),
            slot_mapping=put(slots, torch.int64),
            block_tables=put(tables, torch.int32),
            seq_lens=put([last for _, last in spans], torch.int32),
            query_start=put(starts, torch.int32),
        )

    def packed(
        self, tensors: Sequence[Tensor], rows: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The tokens of a step side by side, on the device."""
        chosen = [tensors[row][a:b] for row, (a, b) in zip(rows, spans, strict=True)]
        return torch.cat(chosen).to(self.device.torch_device)

    def fill(self, row: int, length: int) -> None:
        """Put the first `length` tokens of a row into the pool through the canonical form."""
        spec, size = self.pool.layout.spec, self.block
        count = -(-length // size)
        data = torch.full(
            (2, spec.num_layers, count * size, spec.num_kv_heads, spec.head_dim), float("nan")
        ).to(self.dtype)
        data[0, self.layer.index, :length] = self.k[row][:length]
        data[1, self.layer.index, :length] = self.v[row][:length]
        shape = (2, spec.num_layers, count, size, spec.num_kv_heads, spec.head_dim)
        self.kernels.write_blocks(self.pool, self.tables[row][:count], data.view(shape))
        self.done[row] = length

    def stored(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row as the kernels hold them: [tokens computed, kv_heads, dim]."""
        spec = self.pool.layout.spec
        blocks = self.kernels.read_blocks(self.pool, self.tables[row]).cpu()
        flat = blocks[:, self.layer.index].reshape(2, -1, spec.num_kv_heads, spec.head_dim)
        return flat[0, : self.done[row]], flat[1, : self.done[row]]

    def _compare(self, row: int, first: int, last: int, part: Tensor) -> None:
        inputs = self.q[row][first:last], self.k[row][:last], self.v[row][:last], self.layer
        truth = oracle.attention(*inputs, torch.float64)
        plain = oracle.attention(*inputs, self.dtype)
        honest = (plain.double() - truth).abs().max().item()
        context = self.context
        limit = limit_for(
            context.dtype,
            honest,
            truth.abs().max().item(),
            self._condition(*inputs[:2]),
            context.backend.name,
            context.case.name,
        )
        error = (part.double() - truth).abs()
        worst = torch.nan_to_num(error, nan=float("inf")).max().item()
        context.check(
            float("nan") if worst == float("inf") else worst,
            limit,
            f"row {row}, tokens {first}..{last - 1}",
        )

    def _condition(self, q: Tensor, k: Tensor) -> float:
        """The largest sum of magnitudes behind one score of these queries and keys."""
        group = self.layer.num_heads // self.layer.num_kv_heads
        keys = k.float().abs().amax(0).repeat_interleave(group, 0)  # an upper bound over the keys
        return (q.float().abs() * keys).sum(-1).max().item() * abs(self.layer.scale)
