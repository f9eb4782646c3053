"""Runs segments and attention in order: the traced model on a device, with its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from halyard.compiler.graph import WeightRecipe
from halyard.compiler.segments import AttentionCall, SegmentCall
from halyard.hal.contract import Executable, PagedKernels, WritingKernels
from halyard.hal.types import AttentionLayer, KVPool, StepBatch, WeightInfo

__all__ = ["HeadShape", "Program", "UnboundProgram"]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads that the attention calls of a model see."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class UnboundProgram:
    """A compiled model without weights: what it runs, what it needs."""

    executables: tuple[Executable, ...]  # one a unique segment
    calls: tuple[SegmentCall | AttentionCall, ...]
    result: str  # the logits
    hidden: str  # the final hidden states
    recipes: dict[str, WeightRecipe]
    weights: dict[str, WeightInfo]  # what must come from the checkpoint
    constants: dict[str, Tensor]
    heads: HeadShape
    vocab_size: int
    from_cache: bool = False  # no segment had to be compiled
    token_axes: tuple[int, ...] | None = None  # of the last call's inputs: see rowwise.py

    def bind(self, weights: dict[str, Tensor], kernels: PagedKernels) -> Program:
        """Make the weight inputs and put the program together.

        `weights` is emptied on the way: a tensor is freed as soon as no recipe needs it any more,
        so there are never two copies of all weights.
        """
        left: dict[str, int] = {}
        for recipe in self.recipes.values():
            for source in recipe.sources:
                left[source] = left.get(source, 0) + 1
        made: dict[str, Tensor] = {}
        where = next(iter(weights.values())).device  # constants from the cache are on the host
        for name, recipe in self.recipes.items():
            tensors = []
            for source in recipe.sources:
                left[source] -= 1
                if source in self.constants:
                    tensors.append(self.constants[source].to(where))
                else:
                    tensors.append(weights[source] if left[source] else weights.pop(source))
            made[name] = recipe.make(tensors)
            del tensors
        weights.clear()
        return Program(self, made, kernels)


_LOGIT_INDICES = 2  # its slot


@dataclass(frozen=True, slots=True)
class _SegmentStep:
    run: Executable
    inputs: tuple[int, ...]  # slots
    outputs: tuple[int, ...]
    dead: tuple[int, ...]  # slots whose last use this is


@dataclass(frozen=True, slots=True)
class _AttentionStep:
    layer: AttentionLayer
    q: int
    k: int
    v: int
    output: int
    dead: tuple[int, ...]


class Program:
    """A model that can run. `set_pool` must come before the first `run`."""

    def __init__(
        self, program: UnboundProgram, weights: dict[str, Tensor], kernels: PagedKernels
    ) -> None:
        self.vocab_size = program.vocab_size
        self.weight_bytes = sum(t.numel() * t.element_size() for t in weights.values())
        self._kernels = kernels
        self._pool: KVPool | None = None
        self._slots: dict[str, int] = {}
        self._initial: list[Tensor | None] = []
        for name in ("input:input_ids", "input:positions", "input:logit_indices"):
            self._slot(name)
        for name, tensor in weights.items():
            self._initial[self._slot(f"weight:{name}")] = tensor
        self._num_kept = len(self._initial)  # inputs and weights are never dropped
        self._steps = self._plan(program, weights)
        self._result = self._slots[program.result]
        self._hidden = self._slots[program.hidden]
        self._token_axes = program.token_axes
        self._last_attention = self._find_last_attention()

    def set_pool(self, pool: KVPool) -> None:
        """Where keys and values live."""
        self._pool = pool

    def move_weights(self, device: torch.device) -> None:
        """Put them elsewhere: to free a device's memory, or before it runs again."""
        self._initial = [t if t is None else t.to(device) for t in self._initial]

    def run(self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch) -> Tensor:
        """One step: input_ids [tokens] int64, logit_indices [rows] int64 -> logits [rows, vocab]."""
        # Where few tokens' logits are wanted, the others' last layer ends with their keys and values.
        few = self._token_axes is not None and 2 * len(logit_indices) <= batch.num_tokens
        return self._run(input_ids, logit_indices, batch, few)[0]

    def run_with_hidden(
        self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch
    ) -> tuple[Tensor, Tensor]:
        """As `run`; also the hidden states [tokens, hidden] after the final norm."""
        return self._run(input_ids, logit_indices, batch, few=False)

    @torch.inference_mode()
    def _run(
        self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch, few: bool
    ) -> tuple[Tensor, Tensor]:
        pool = self._pool
        if pool is None:
            raise AssertionError("the program has no KV pool yet")
        values: list[Any] = list(self._initial)  # of Tensor; None where dropped or not yet made
        values[0], values[1], values[2] = input_ids, batch.positions, logit_indices
        attend, last = self._kernels.attend, self._steps[-1]
        for step in self._steps:
            if type(step) is _SegmentStep:
                inputs = [values[slot] for slot in step.inputs]
                if few and step is last:
                    inputs = self._narrowed(step, inputs, logit_indices)
                results = step.run(*inputs)
                for slot, value in zip(step.outputs, results, strict=True):
                    values[slot] = value
            elif few and step is self._last_attention:
                values[step.output] = self._attend_few(step, values, pool, logit_indices, batch)
            elif type(step) is _AttentionStep:
                values[step.output] = attend(
                    values[step.q],
                    values[step.k],
                    values[step.v],
                    pool,
                    step.layer,
                    batch,
                )
            for slot in step.dead:
                values[slot] = None
        return values[self._result], values[self._hidden]

    def _narrowed(self, step: _SegmentStep, inputs: list[Any], logit_indices: Tensor) -> list[Any]:
        """The last segment's inputs for the tokens whose logits are wanted alone."""
        attention = self._last_attention
        done = attention.output if attention is not None else -1  # is of these tokens already
        narrowed = []
        for slot, value, axis in zip(step.inputs, inputs, self._token_axes or (), strict=True):
            if slot == _LOGIT_INDICES:
                value = torch.arange(len(logit_indices), device=logit_indices.device)
            elif axis >= 0 and slot != done:
                value = value.index_select(axis, logit_indices)
            narrowed.append(value)
        return narrowed

    def _find_last_attention(self) -> _AttentionStep | None:
        """The attention right before a last segment that goes token by token, if its kernels write
        keys and values without attending too."""
        if self._token_axes is None or not getattr(self._kernels, "writes_alone", False):
            return None
        attention, last = self._steps[-2:]
        if type(attention) is not _AttentionStep or type(last) is not _SegmentStep:
            return None
        axes = dict(zip(last.inputs, self._token_axes, strict=True))
        return attention if axes.get(attention.output) == 0 else None

    def _attend_few(
        self,
        step: _AttentionStep,
        values: list[Any],
        pool: KVPool,
        wanted: Tensor,
        batch: StepBatch,
    ) -> Tensor:
        """Write all keys and values; attention of the wanted tokens alone, each a row of its own."""
        kernels = self._kernels
        q, k, v = values[step.q], values[step.k], values[step.v]
        cast(WritingKernels, kernels).write(k, v, pool, step.layer, batch)
        few = _rows_of_one(batch, wanted)
        n = len(wanted)  # keys and values have no slots any more: any will do
        return kernels.attend(q.index_select(0, wanted), k[:n], v[:n], pool, step.layer, few)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            self._slots[name] = len(self._initial)
            self._initial.append(None)
        return self._slots[name]

    def _plan(
        self, program: UnboundProgram, weights: dict[str, Tensor]
    ) -> list[_SegmentStep | _AttentionStep]:
        """Names become slots; every slot is dropped after its last use."""
        uses: list[tuple[set[int], set[int]]] = []
        for call in program.calls:
            if isinstance(call, SegmentCall):
                reads = {self._slot(name) for name in call.inputs}
                uses.append((reads, {self._slot(name) for name in call.outputs}))
            else:
                uses.append(({self._slot(call.q), self._slot(call.k), self._slot(call.v)},
                             {self._slot(call.output)}))  # fmt: skip
        last = {
            slot: position for position, (reads, made) in enumerate(uses) for slot in reads | made
        }
        for kept in (program.result, program.hidden):
            last[self._slots[kept]] = len(uses)
        steps: list[_SegmentStep | _AttentionStep] = []
        for position, (call, (reads, made)) in enumerate(zip(program.calls, uses, strict=True)):
            dead = tuple(
                s for s in sorted(reads | made) if s >= self._num_kept and last[s] == position
            )
            if isinstance(call, SegmentCall):
                steps.append(
                    _SegmentStep(
                        program.executables[call.segment],
                        tuple(self._slots[name] for name in call.inputs),
                        tuple(self._slots[name] for name in call.outputs),
                        dead,
                    )
                )
            else:
                layer = AttentionLayer(
                    index=call.layer,
                    num_heads=program.heads.num_heads,
                    num_kv_heads=program.heads.num_kv_heads,
                    head_dim=program.heads.head_dim,
                    scale=call.scale,
                    window=call.window,
                    softcap=call.softcap,
                    sinks=weights[call.sinks.removeprefix("weight:")] if call.sinks else None,
                )
                steps.append(
                    _AttentionStep(
                        layer,
                        self._slots[call.q],
                        self._slots[call.k],
                        self._slots[call.v],
                        self._slots[call.output],
                        dead,
                    )
                )
        return steps


def _rows_of_one(batch: StepBatch, tokens: Tensor) -> StepBatch:
    """Tokens [n] int64 of a batch as decode rows without slots."""
    # Rows without tokens begin where the next one does: the last that begins there has the token.
    rows = torch.searchsorted(batch.query_start, tokens.to(torch.int32), right=True) - 1
    positions = batch.positions.index_select(0, tokens)
    return replace(
        batch,
        num_tokens=len(tokens),
        num_rows=len(tokens),
        max_query_len=1,
        positions=positions,
        slot_mapping=torch.full_like(tokens, -1),
        block_tables=batch.block_tables.index_select(0, rows),
        seq_lens=(positions + 1).to(torch.int32),
        query_start=torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device),
        shared=None,
    )
