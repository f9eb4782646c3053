"""L3: attention against the fp64 oracle, in every shape that the contract names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.hal.conformance.sequences import Sequences
from halyard.hal.types import BlockMove, DType, Requirements

__all__ = ["cases"]

LENGTHS = [1, 15, 16, 17, 97]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
HEADS = {"mha": (4, 4), "gqa": (4, 2), "gqa_3": (12, 4), "mqa": (5, 1), "gqa_16": (16, 1)}
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)
BLOCK_SIZES = (1, 8, 16, 32, 64, 128)
FEATURES: dict[str, dict[str, Any]] = {
    "window_5": {"window": 5},
    "window_16": {"window": 16},
    "window_33": {"window": 33},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "window_softcap_sinks": {"window": 20, "softcap": 2.0, "sinks": True},
}
LONGEST = 8193  # on the host; an accelerator is asked for four times as much


def cases(backend: BackendUnderTest) -> list[Case]:
    """Every cell for every dtype; the null kernels compute nothing."""
    if not backend.computes:
        return []
    return [case for dtype in DTYPES for case in _of_dtype(backend, dtype)]


def _of_dtype(backend: BackendUnderTest, dtype: DType) -> Iterator[Case]:
    def cell(
        name: str, run: Callable[[CaseContext], None], *, quick: bool = False,
        seconds: float = 120.0, **params: Any,
    ) -> Case:  # fmt: skip
        heads, kv_heads = params.get("heads", 4), params.get("kv_heads", 2)
        need = Requirements(
            dtype,
            dtype,
            params.get("block", 16),
            heads,
            kv_heads,
            params.get("dim", 64),
            window=bool(params.get("window")),
            softcap=bool(params.get("softcap")),
            sinks=bool(params.get("sinks")),
        )
        return Case("L3", name, run, dtype, need, params, seconds, quick)

    yield cell("prefill.lengths", _prefill, quick=True)
    yield cell("prefill.one_token", _one_token)
    yield cell("prefill.1025", _long_prefill)
    yield cell("decode.lengths", _decode, quick=True)
    yield cell("decode.1025", _long_decode)
    yield cell("decode.130_rows", _many_rows)
    yield cell("decode.longest", _longest, kv_heads=1)
    yield cell("decode.longest_window", _longest, kv_heads=1, window=1000)
    yield cell("decode.longest_sinks", _longest, kv_heads=1, sinks=True)
    yield cell("mixed", _mixed, quick=True)
    yield cell("chunked", _chunked, quick=True)
    yield cell("chunked.equals_full", _chunked_equals_full)
    yield cell("prefix_hit", _prefix_hit, quick=True)
    yield cell("prefix_hit.same_step", _prefix_of_this_step, quick=True)
    yield cell("permuted_equals_identity", _permuted_equals_identity, quick=True)
    yield cell("swapped_equals_resident", _swapped_equals_resident, quick=True)
    yield cell("each_layer_its_own", _layers, quick=True)
    yield cell("sharp_scores", _sharp)
    yield cell("strided_inputs", _strided)
    yield cell("rows_do_not_see_each_other", _rows_apart, quick=True)
    for name, (heads, kv_heads) in HEADS.items():
        yield cell(f"heads.{name}", _prefill_then_decode, quick=name in ("gqa_3", "mqa"),
                   heads=heads, kv_heads=kv_heads)  # fmt: skip
    for dim in HEAD_DIMS:
        yield cell(f"head_dim.{dim}", _prefill_then_decode, dim=dim)
    for block in BLOCK_SIZES:
        yield cell(f"block_size.{block}", _prefill_then_decode, block=block)
    for name, features in FEATURES.items():
        yield cell(f"{name}.prefill_and_decode", _prefill_then_decode, quick=True, **features)
        yield cell(f"{name}.chunked", _chunked, **features)


def _shape(context: CaseContext) -> dict[str, Any]:
    return dict(context.case.params)


def _prefill(context: CaseContext) -> None:
    Sequences(context, LENGTHS, **_shape(context)).step(LENGTHS)


def _one_token(context: CaseContext) -> None:
    sequences = Sequences(context, [2], **_shape(context))
    sequences.step([1])
    sequences.step([1])


def _long_prefill(context: CaseContext) -> None:
    sequences = Sequences(context, [1026], **_shape(context))
    sequences.step([1025])
    sequences.step([1])


def _decode(context: CaseContext) -> None:
    sequences = Sequences(context, [n + 2 for n in LENGTHS], **_shape(context))
    for row, length in enumerate(LENGTHS):
        sequences.fill(row, length)
    sequences.step([1] * len(LENGTHS))
    sequences.step([1] * len(LENGTHS))


def _long_decode(context: CaseContext) -> None:
    sequences = Sequences(context, [1025, 1024, 1026, 31], **_shape(context))
    for row, length in enumerate((1024, 1023, 1025, 30)):
        sequences.fill(row, length)
    sequences.step([1] * 4)


def _many_rows(context: CaseContext) -> None:
    lengths = [1 + (37 * n) % 90 for n in range(130)]
    sequences = Sequences(context, [n + 1 for n in lengths], **_shape(context))
    for row, length in enumerate(lengths):
        sequences.fill(row, length)
    sequences.step([1] * len(lengths))


def _longest(context: CaseContext) -> None:
    length = LONGEST if context.device.torch_device.type == "cpu" else 4 * LONGEST - 3
    context.notes["tokens"] = length
    sequences = Sequences(context, [length, 40], layers=1, **_shape(context))
    sequences.fill(0, length - 1)
    sequences.fill(1, 39)
    sequences.step([1, 1])


def _mixed(context: CaseContext) -> None:
    sequences = Sequences(context, [97, 50, 20], **_shape(context))
    for counts in ([15, 1, 0], [17, 1, 5], [33, 48, 1], [32, 0, 14]):
        sequences.step(counts)


def _chunked(context: CaseContext) -> None:
    sequences = Sequences(context, [97, 34], **_shape(context))
    for counts in ([15, 1], [1, 16], [17, 17], [64, 0]):
        sequences.step(counts)


def _chunked_equals_full(context: CaseContext) -> None:
    full = Sequences(context, [97], **_shape(context)).step([97])[0]
    chunked = Sequences(context, [97], **_shape(context))
    parts = [chunked.step([n])[0] for n in (16, 33, 1, 47)]
    context.notes["bit_equal"] = torch.equal(torch.cat(parts), full)


def _prefix_hit(context: CaseContext) -> None:
    """A second sequence uses the first one's full blocks and computes only what is its own."""
    sequences = Sequences(context, [50, 45], **_shape(context))
    sequences.step([50, 0])
    for own in (sequences.q, sequences.k, sequences.v):
        own[1][:32] = own[0][:32]
    sequences.tables[1][:2] = sequences.tables[0][:2]
    sequences.done[1] = 32
    sequences.step([0, 12])
    sequences.step([0, 1])


def _prefix_of_this_step(context: CaseContext) -> None:
    """Rows read blocks that another row writes in this very step, wherever it stands among them."""
    sequences = Sequences(context, [60, 300, 70, 40], **_shape(context))
    for row in (0, 2, 3):
        for own in (sequences.q, sequences.k, sequences.v):
            own[row][:32] = own[1][:32]
        sequences.tables[row][:2] = sequences.tables[1][:2]
        sequences.done[row] = 32
    sequences.step([1, 290, 33, 1])
    sequences.step([1, 1, 1, 1])


def _permuted_equals_identity(context: CaseContext) -> None:
    results = []
    for order in ("permuted", "identity"):
        sequences = Sequences(context, [70, 33], order=order, **_shape(context))
        results.append(sequences.step([69, 32]) + sequences.step([1, 1]))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    context.require(same, "the result depends on where in the pool the blocks lie")


def _swapped_equals_resident(context: CaseContext) -> None:
    resident = Sequences(context, [50], **_shape(context))
    resident.step([49])
    expected = resident.step([1])[0]
    moved = Sequences(context, [50], **_shape(context))
    moved.step([49])
    host = context.device.allocate_kv(moved.pool.layout, 6, host=True)
    host.data.fill_(float("nan"))
    blocks = moved.tables[0]
    there = [4, 1, 5, 0]
    out = [BlockMove(b, h) for b, h in zip(blocks, there, strict=True)]
    moved.kernels.swap_out(moved.pool, host, out)
    moved.pool.data.fill_(float("nan"))
    everything = list(range(moved.pool.num_blocks))
    targets = [*[b for b in everything if b not in blocks][:2], blocks[0], blocks[3]]
    back = [BlockMove(h, t) for h, t in zip(there, targets, strict=True)]
    moved.kernels.swap_in(moved.pool, host, back)
    moved.tables[0] = targets
    found = moved.step([1])[0]
    context.require(torch.equal(found, expected), "a swapped sequence differs from a resident one")


def _layers(context: CaseContext) -> None:
    """Layers of one pool hold different contents."""
    shape = _shape(context)
    one = Sequences(context, [20, 18], layers=3, layer_index=0, seed=1, **shape)
    two = Sequences(context, [20, 18], layers=3, layer_index=2, seed=2, **shape)
    two.pool, two.tables = one.pool, one.tables
    one.step([18, 17])
    two.step([18, 17])
    one.step([1, 1])
    two.step([1, 1])


def _sharp(context: CaseContext) -> None:
    """Scores far apart: a softmax without its maximum taken off would overflow."""
    sequences = Sequences(context, [97, 40], gain=30.0, **_shape(context))
    sequences.step([96, 39])
    sequences.step([1, 1])


def _strided(context: CaseContext) -> None:
    """q, k and v may be slices of one fused projection."""
    sequences = Sequences(context, [24], **_shape(context))
    heads, kv_heads, dim = 4, 2, sequences.layer.head_dim
    parts = [x[0].flatten(1) for x in (sequences.q, sequences.k, sequences.v)]
    fused = torch.cat(parts, dim=1).to(context.device.torch_device)
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (piece.view(24, -1, dim) for piece in torch.split(fused, widths, dim=1))
    context.require(not q.is_contiguous(), "the case does not test what it says")
    batch = sequences.batch([0], [(0, 24)])
    found = context.kernels.attend(q, k, v, sequences.pool, sequences.layer, batch).cpu()
    plain = Sequences(context, [24], **_shape(context)).step([24])[0]
    context.require(
        torch.equal(found, plain), "strided inputs give another result than packed ones"
    )


def _rows_apart(context: CaseContext) -> None:
    """What a row gets is the same whoever else is in the batch, up to the dtype's error."""
    together = Sequences(context, [50, 97, 30], seed=3, **_shape(context))
    alone = Sequences(context, [50, 97, 30], seed=3, **_shape(context))
    beside = together.step([49, 96, 29]) + together.step([1, 1, 1])
    single = []
    for counts in ([49, 0, 0], [0, 96, 0], [0, 0, 29], [1, 0, 0], [0, 1, 0], [0, 0, 1]):
        single += alone.step(counts)
    same = [torch.equal(a, b) for a, b in zip(beside, single, strict=True)]
    context.notes["bit_equal_share"] = sum(same) / len(same)


def _prefill_then_decode(context: CaseContext) -> None:
    sequences = Sequences(context, [n + 2 for n in LENGTHS], **_shape(context))
    sequences.step(LENGTHS)
    sequences.step([1] * len(LENGTHS))
    sequences.step([1] * len(LENGTHS))
