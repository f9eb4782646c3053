"""Tests the tests: kernel sets that are wrong in one way each, and have to be noticed.

A mutant wraps the backend's own kernels and spoils one thing on the way in or out, as a bug of that
kind would. It is run through the quick cases of L2 and L3; the first that fails kills it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from halyard.hal.conformance import l2_blocks, l3_attention
from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.hal.types import (
    AttentionLayer,
    BlockMove,
    DType,
    KVPool,
    Requirements,
    StepBatch,
)

__all__ = ["MUTATIONS", "MutantKernels", "cases"]


@dataclass(slots=True)
class _Call:
    """The arguments of one attend, to be spoiled."""

    q: Tensor
    k: Tensor
    v: Tensor
    pool: KVPool
    layer: AttentionLayer
    batch: StepBatch


class MutantKernels:
    """The inner kernels with hooks; by themselves the hooks change nothing."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def spoil(self, call: _Call) -> _Call:
        return call

    def spoil_output(self, out: Tensor, call: _Call) -> Tensor:
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        call = self.spoil(_Call(q, k, v, pool, layer, batch))
        out = self._inner.attend(call.q, call.k, call.v, call.pool, call.layer, call.batch)
        return self.spoil_output(out, call)

    def copy_blocks(self, pool: KVPool, moves: Sequence[BlockMove]) -> None:
        self._inner.copy_blocks(pool, moves)

    def swap_out(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self._inner.swap_out(pool, host, moves)

    def swap_in(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self._inner.swap_in(pool, host, moves)

    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        read: Tensor = self._inner.read_blocks(pool, blocks)
        return read

    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        self._inner.write_blocks(pool, blocks, data)


def _batch(change: Callable[[StepBatch, int], dict[str, Tensor]]) -> type[MutantKernels]:
    class Mutant(MutantKernels):
        def spoil(self, call: _Call) -> _Call:
            changes: Any = change(call.batch, call.pool.layout.spec.block_size)
            return replace(call, batch=replace(call.batch, **changes))

    return Mutant


def _layer(change: Callable[[AttentionLayer], dict[str, Any]]) -> type[MutantKernels]:
    class Mutant(MutantKernels):
        def spoil(self, call: _Call) -> _Call:
            return replace(call, layer=replace(call.layer, **change(call.layer)))

    return Mutant


def _inputs(change: Callable[[_Call], dict[str, Tensor]]) -> type[MutantKernels]:
    class Mutant(MutantKernels):
        def spoil(self, call: _Call) -> _Call:
            return replace(call, **change(call))  # type: ignore[arg-type]

    return Mutant


def _output(change: Callable[[Tensor, _Call], Tensor]) -> type[MutantKernels]:
    class Mutant(MutantKernels):
        def spoil_output(self, out: Tensor, call: _Call) -> Tensor:
            return change(out, call)

    return Mutant


def _moves(name: str, change: Callable[[list[BlockMove]], list[BlockMove]]) -> type[MutantKernels]:
    """Spoils the moves of copy_blocks, swap_out or swap_in."""

    def spoiled(self: MutantKernels, *arguments: Any) -> None:
        *pools, moves = arguments
        getattr(self._inner, name)(*pools, change(list(moves)))

    return type("Mutant", (MutantKernels,), {name: spoiled})


def _slots_off_by_one(batch: StepBatch, size: int) -> dict[str, Tensor]:
    slots = batch.slot_mapping
    moved = slots - slots % size + (slots + 1) % size
    return {"slot_mapping": torch.where(slots >= 0, moved, slots)}


def _last_token_not_written(batch: StepBatch, size: int) -> dict[str, Tensor]:
    slots = batch.slot_mapping.clone()
    slots[-1] = -1
    return {"slot_mapping": slots}


def _first_blocks_exchanged(batch: StepBatch, size: int) -> dict[str, Tensor]:
    tables = batch.block_tables.clone()
    if tables.shape[1] > 1:
        both = batch.seq_lens > size
        tables[both, 0], tables[both, 1] = batch.block_tables[both, 1], batch.block_tables[both, 0]
    return {"block_tables": tables}


def _last_block_is_the_first(batch: StepBatch, size: int) -> dict[str, Tensor]:
    tables = batch.block_tables.clone()
    rows = torch.arange(len(tables), device=tables.device)
    last = (batch.seq_lens.long() - 1) // size
    tables[rows, last] = batch.block_tables[:, 0]
    return {"block_tables": tables}


def _last_token_dropped(batch: StepBatch, size: int) -> dict[str, Tensor]:
    longer = batch.seq_lens > batch.query_start.diff()
    return {"seq_lens": batch.seq_lens - longer.to(batch.seq_lens.dtype)}


def _one_token_too_many(batch: StepBatch, size: int) -> dict[str, Tensor]:
    inside = batch.seq_lens % size != 0
    return {"seq_lens": batch.seq_lens + inside.to(batch.seq_lens.dtype)}


def _no_slot_is_slot_zero(batch: StepBatch, size: int) -> dict[str, Tensor]:
    return {"slot_mapping": batch.slot_mapping.clamp(min=0)}


def _tables_of_the_row_before(batch: StepBatch, size: int) -> dict[str, Tensor]:
    rolled = batch.block_tables.roll(1, 0)
    counts = (batch.seq_lens + size - 1) // size
    same = counts == counts.roll(1)
    return {"block_tables": torch.where(same[:, None], rolled, batch.block_tables)}


def _heads_of_another_group(out: Tensor, call: _Call) -> Tensor:
    return out.roll(call.layer.num_heads // call.layer.num_kv_heads, dims=1).contiguous()


def _rows_exchanged(out: Tensor, call: _Call) -> Tensor:
    starts = call.batch.query_start.tolist()
    swapped = out.clone()
    swapped[starts[0]] = out[starts[-2]]
    swapped[starts[-2]] = out[starts[0]]
    return swapped


def _coarse(out: Tensor, call: _Call) -> Tensor:
    """Rounded as by a kernel that keeps its sums in too few bits."""
    bits = {torch.float32: 12, torch.bfloat16: 5, torch.float16: 7}[out.dtype]
    mantissa, exponent = torch.frexp(out.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(out.dtype)


class _OtherLayer(MutantKernels):
    def spoil(self, call: _Call) -> _Call:
        return replace(call, layer=replace(call.layer, index=0))


class _RowsInTurn(MutantKernels):
    """A row attends before the rows after it have written."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        out = torch.empty_like(q)
        for first, last in pairwise(batch.query_start.tolist()):
            slots = torch.full_like(batch.slot_mapping, -1)
            slots[first:last] = batch.slot_mapping[first:last]
            alone = replace(batch, slot_mapping=slots)
            out[first:last] = self._inner.attend(q, k, v, pool, layer, alone)[first:last]
        return out


class _BlocksBehindCountNothing(MutantKernels):
    """What a table names behind a row's own blocks is read and weighted with zero, not left out."""

    def spoil_output(self, out: Tensor, call: _Call) -> Tensor:
        tables, size = call.batch.block_tables.cpu(), call.pool.layout.spec.block_size
        own = (call.batch.seq_lens.cpu() + size - 1) // size
        behind = sorted({*tables[torch.arange(tables.shape[1]) >= own[:, None]].tolist()})
        if not behind:
            return out
        read: Tensor = self._inner.read_blocks(call.pool, behind).float().sum()
        weighted: Tensor = out + 0 * read.to(out.device)
        return weighted.to(out.dtype)


class _KeysForValues(MutantKernels):
    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        read: Tensor = self._inner.read_blocks(pool, blocks)
        return read.flip(0)


class _OneLayerNotWritten(MutantKernels):
    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        old = self._inner.read_blocks(pool, blocks).to(data.device)
        old[:, :-1] = data[:, :-1]
        self._inner.write_blocks(pool, blocks, old)


def _next_target(moves: list[BlockMove]) -> list[BlockMove]:
    targets = [move.target for move in moves]
    return [BlockMove(m.source, t) for m, t in zip(moves, targets[1:] + targets[:1], strict=True)]


def _next_source(moves: list[BlockMove]) -> list[BlockMove]:
    sources = [move.source for move in moves]
    return [BlockMove(s, m.target) for m, s in zip(moves, sources[1:] + sources[:1], strict=True)]


# name -> (mutant, what the kernels must claim for it to make a difference)
MUTATIONS: dict[str, tuple[type[MutantKernels], str]] = {
    "slots_off_by_one": (_batch(_slots_off_by_one), ""),
    "last_token_not_written": (_batch(_last_token_not_written), ""),
    "no_slot_is_slot_zero": (_batch(_no_slot_is_slot_zero), ""),
    "first_blocks_exchanged": (_batch(_first_blocks_exchanged), ""),
    "last_block_is_the_first": (_batch(_last_block_is_the_first), ""),
    "last_token_dropped": (_batch(_last_token_dropped), ""),
    "one_token_too_many": (_batch(_one_token_too_many), ""),
    "tables_of_the_row_before": (_batch(_tables_of_the_row_before), ""),
    "blocks_behind_count_nothing": (_BlocksBehindCountNothing, ""),
    "scale_a_tenth_too_large": (_layer(lambda layer: {"scale": layer.scale * 1.1}), ""),
    "window_one_too_wide": (
        _layer(lambda layer: {"window": layer.window + 1 if layer.window else 0}), "window"),
    "window_one_too_narrow": (_layer(lambda layer: {"window": max(layer.window - 1, 0)}), "window"),
    "window_forgotten": (_layer(lambda layer: {"window": 0}), "window"),
    "softcap_forgotten": (_layer(lambda layer: {"softcap": 0.0}), "softcap"),
    "sinks_forgotten": (_layer(lambda layer: {"sinks": None}), "sinks"),
    "another_layer": (_OtherLayer, ""),
    "heads_of_another_group": (_output(_heads_of_another_group), ""),
    "kv_heads_exchanged": (
        _inputs(lambda call: {"k": call.k.flip(1).contiguous(), "v": call.v}), ""),
    "heads_exchanged": (_output(lambda out, _: out.flip(1).contiguous()), ""),
    "rows_in_turn": (_RowsInTurn, ""),
    "rows_exchanged": (_output(_rows_exchanged), ""),
    "too_few_bits": (_output(_coarse), ""),
    "keys_for_values": (_KeysForValues, ""),
    "one_layer_not_written": (_OneLayerNotWritten, ""),
    "copy_forgotten": (_moves("copy_blocks", lambda moves: []), ""),
    "copy_to_the_next_block": (_moves("copy_blocks", _next_target), ""),
    "swap_out_to_the_next_block": (_moves("swap_out", _next_target), ""),
    "swap_out_of_the_last_forgotten": (_moves("swap_out", lambda moves: moves[:-1]), ""),
    "swap_in_from_the_next_block": (_moves("swap_in", _next_source), ""),
}  # fmt: skip


def cases(backend: BackendUnderTest) -> list[Case]:
    """A case for each mutation; it fails if the mutant survives."""
    dtypes = backend.claimed_dtypes()
    if not backend.computes or not dtypes:
        return []
    dtype: DType = dtypes[0]
    return [
        Case(
            "mutants",
            name,
            _kill,
            dtype,
            Requirements(dtype, dtype, 16, 4, 2, 64, **({feature: True} if feature else {})),
            {"mutation": name, "feature": feature},
        )
        for name, (_, feature) in MUTATIONS.items()
    ]


def _kill(context: CaseContext) -> None:
    mutant = MUTATIONS[context.case.params["mutation"]][0]
    feature = context.case.params["feature"]
    noticed_by = "prefix_hit.same_step" if mutant is _RowsInTurn else ""
    tried = 0
    found = [*l2_blocks.cases(context.backend), *l3_attention.cases(context.backend)]

    def notices(case: Case) -> bool:
        return bool(feature and case.params.get(feature)) or case.name == noticed_by

    for case in sorted(
        found, key=notices, reverse=True
    ):  # what has the spoiled feature comes first
        if not case.quick or case.dtype != context.dtype or case.unclaimed(context.backend):
            continue
        tried += 1
        wrapped: Any = mutant(context.kernels)  # it has what it needs of PagedKernels
        own = CaseContext(case, context.backend, context.device, wrapped, context.compiler)
        try:
            case.run(own)
        except Exception as error:  # noqa: BLE001 - however a mutant ends, it was noticed
            context.notes["killed_by"] = case.id
            context.notes["with"] = " ".join(str(error).split())[:200]
            return
    context.require(False, f"the mutant survived {tried} cases")
