"""A program run step by step, with what every attention layer saw and gave written down."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from halyard.compiler.program import HeadShape, Program, UnboundProgram
from halyard.hal.contract import Device, GraphCompiler, PagedKernels
from halyard.hal.types import AttentionLayer, DType, KVPool, StepBatch
from halyard.models.adapter import build_meta_module
from halyard.models.spec import ModelSpec

__all__ = ["OPERATIONS", "Recorded", "RecordingKernels", "Steps", "compile_model"]

OPERATIONS = ("query", "key", "value", "attention")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One tensor of one layer in one step, on the host: [tokens, heads, dim]."""

    layer: int
    operation: str  # one of OPERATIONS
    tensor: Tensor


class RecordingKernels:
    """Kernels that keep the inputs and the output of every attend in `records`."""

    def __init__(self, inner: PagedKernels) -> None:
        self._inner = inner
        self.records: list[Recorded] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        out = self._inner.attend(q, k, v, pool, layer, batch)
        for operation, tensor in zip(OPERATIONS, (q, k, v, out), strict=True):
            self.records.append(Recorded(layer.index, operation, tensor.detach().cpu().clone()))
        return out


def compile_model(
    spec: ModelSpec, dtype: DType, device: Device, compiler: GraphCompiler
) -> UnboundProgram:
    """Trace and compile, without the artefact cache: what is tested is what the code does now."""
    from halyard.compiler.build import build_program

    model = build_meta_module(spec, dtype)
    return build_program(
        model,
        model.buffers_by_name,
        compiler,
        device.info,
        name=spec.architecture,
        windows=spec.windows,
        heads=HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim),
        vocab_size=spec.vocab_size,
        dtype=dtype,
        torch_device=device.torch_device,
    )


class Steps:
    """Sequences of tokens fed to a program in steps of any shape, blocks in random places."""

    def __init__(
        self,
        unbound: UnboundProgram,
        weights: dict[str, Tensor],
        spec: ModelSpec,
        dtype: DType,
        device: Device,
        kernels: PagedKernels,
        sequences: Sequence[Sequence[int]],
        block_size: int = 16,
    ) -> None:
        self.kernels = RecordingKernels(kernels)
        self.device, self.block, self.sequences = device, block_size, sequences
        self.program: Program = unbound.bind(dict(weights), cast("PagedKernels", self.kernels))
        counts = [-(-len(tokens) // block_size) for tokens in sequences]
        layout = kernels.layout(spec.kv_spec(dtype, block_size))
        pool = device.allocate_kv(layout, sum(counts) + 1, host=False)
        pool.data.fill_(float("nan"))  # whoever reads a slot that nobody wrote shows it
        self.program.set_pool(pool)
        ids = list(range(sum(counts) + 1))
        random.Random(0).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(count)] for count in counts]
        self.done = [0] * len(sequences)

    def step(self, counts: dict[int, int]) -> dict[int, Tensor]:
        """Compute `counts[sequence]` more tokens; logits [tokens, vocab] of each, on the host."""
        rows, block = list(counts), self.block
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for row in rows:
            first, table = self.done[row], self.tables[row]
            self.done[row] = last = first + counts[row]
            tokens += self.sequences[row][first:last]
            positions += range(first, last)
            slots += [table[p // block] * block + p % block for p in range(first, last)]
            starts.append(len(tokens))
        width = max(-(-self.done[row] // block) for row in rows)
        tables = [(self.tables[row] + [-1] * width)[:width] for row in rows]

        def put(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device.torch_device)

        batch = StepBatch(
            num_tokens=len(tokens),
            num_rows=len(rows),
            max_query_len=max(counts.values()),
            max_seq_len=max(self.done[row] for row in rows),
            positions=put(positions, torch.int64),
            slot_mapping=put(slots, torch.int64),
            block_tables=put(tables, torch.int32),
            seq_lens=put([self.done[row] for row in rows], torch.int32),
            query_start=put(starts, torch.int32),
        )
        wanted = torch.arange(len(tokens), device=self.device.torch_device)
        logits = self.program.run(put(tokens, torch.int64), wanted, batch).cpu()
        return {row: logits[starts[i] : starts[i + 1]] for i, row in enumerate(rows)}
