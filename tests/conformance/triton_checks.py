"""Checks of the Triton kernels that hold on any device: the interpreter's CPU and a real GPU.

Not collected by itself: test_triton_interpreter.py and tests/device/test_cuda_kernels.py run these.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halyard.hal.conformance.case import CaseContext
from halyard.hal.conformance.sequences import Sequences
from halyard.hal.dtypes import torch_dtype
from halyard.hal.kernels.triton.kernels import TritonKernels
from halyard.hal.types import BlockMove, DType, KVSpec, SharedRows, StepBatch
from halyard.runtime.shared_rows import find_shared_rows

LENGTHS = [1, 15, 16, 17, 97]
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"heads": 4, "kv_heads": 4},
    "mqa_5": {"heads": 5, "kv_heads": 1},
    "gqa_3": {"heads": 12, "kv_heads": 4},
    "group_wider_than_a_tile": {"heads": 80, "kv_heads": 1, "dim": 16},
    "dim_24": {"dim": 24},
    "dim_80": {"dim": 80},
    "dim_128": {"dim": 128},
    "dim_256": {"dim": 256},
    "block_32": {"block": 32},
    "block_128": {"block": 128},
    "window_5": {"window": 5},
    "window_33": {"window": 33},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all_features": {"window": 20, "softcap": 2.0, "sinks": True},
}


def context(device: Any, dtype: DType, **options: Any) -> Any:
    """A context for `Sequences` on a device; options go to the kernels."""
    case: Any = SimpleNamespace(dtype=dtype, name="triton", id="triton")
    backend: Any = SimpleNamespace(name="triton")
    return CaseContext(case, backend, device, TritonKernels(device, **options), None)  # type: ignore[arg-type]


def prefill_then_decode(made: Any, **shape: Any) -> None:
    sequences = Sequences(made, [n + 2 for n in LENGTHS], **shape)
    sequences.step(LENGTHS)
    sequences.step([1] * len(LENGTHS))
    sequences.step([1] * len(LENGTHS))


def mixed(made: Any, **shape: Any) -> None:
    sequences = Sequences(made, [97, 50, 20], **shape)
    for counts in ([15, 1, 0], [17, 1, 5], [33, 48, 1], [32, 0, 14]):
        sequences.step(counts)


def filled_up(made: Any, **shape: Any) -> None:
    """A recorded step's filling: rows without tokens, tokens without a row. Nobody else notices."""
    for lengths, counts in (([97, 50, 20], [33, 1, 5]), ([700, 40, 30], [20, 1, 1])):
        sequences = Sequences(made, lengths, **shape)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            sequences.fill(row, length - count)
        spans = list(zip(sequences.done, lengths, strict=True))
        batch = sequences.batch(range(3), spans)
        q, k, v = (
            sequences.packed(x, range(3), spans) for x in (sequences.q, sequences.k, sequences.v)
        )
        more, tokens = 9, 7  # rows and tokens

        def longer(tensor: Any, count: int, value: float) -> Any:
            filling = torch.full((count, *tensor.shape[1:]), value, dtype=tensor.dtype)
            return torch.cat([tensor, filling.to(tensor.device)])

        total = batch.num_tokens
        padded = replace(
            batch,
            num_tokens=total + tokens,
            num_rows=3 + more,
            max_query_len=total + tokens,
            max_seq_len=2 * batch.max_seq_len,
            positions=longer(batch.positions, tokens, 0),
            slot_mapping=longer(batch.slot_mapping, tokens, -1),
            block_tables=longer(batch.block_tables, more, 0),
            seq_lens=longer(batch.seq_lens, more, 0),
            query_start=longer(batch.query_start, more, total),
        )
        before = sequences.pool.data.clone()
        nan = float("nan")
        inputs = (longer(q, tokens, nan), longer(k, tokens, nan), longer(v, tokens, nan))
        found = made.kernels.attend(*inputs, sequences.pool, sequences.layer, padded).cpu()
        starts = batch.query_start.tolist()
        for row, (first, last) in enumerate(spans):
            sequences._compare(row, first, last, found[starts[row] : starts[row + 1]])
        written = (sequences.pool.data != before).flatten(2).any(-1).any(0).nonzero().flatten()
        held = {block for table in sequences.tables for block in table}
        nans = before.isnan().flatten(2).any(-1).any(0).nonzero().flatten()  # NaN equals nothing
        assert set(written.tolist()) - set(nans.tolist()) <= held


def long_mixed(made: Any, **shape: Any) -> None:
    """Long enough that decode rows beside a chunk go to the decode kernel, keys split."""
    sequences = Sequences(made, [1040, 1100, 70], **shape)
    sequences.fill(0, 1030)
    sequences.fill(1, 1099)
    sequences.step([3, 1, 40])
    sequences.step([1, 0, 5])


def moves(made: Any, *, layers: int = 3) -> None:
    """Blocks out to the host and back, and copied, bit for bit; an odd number of words too."""
    kernels, device = made.kernels, made.device
    for dim in (24, 64):
        spec = KVSpec(layers, 2, dim, made.dtype, 16)
        pool = device.allocate_kv(kernels.layout(spec), 9, host=False)
        host = device.allocate_kv(kernels.layout(spec), 5, host=True)
        pool.data.copy_(torch.randn(pool.data.shape))
        original = pool.data.clone()
        kernels.swap_out(pool, host, [BlockMove(1, 3), BlockMove(4, 0), BlockMove(5, 1)])
        device.synchronize()
        assert torch.equal(host.data[:, [3, 0, 1]], original[:, [1, 4, 5]].cpu())
        pool.data[:, [1, 4, 5]] = float("nan")
        kernels.swap_in(pool, host, [BlockMove(3, 5), BlockMove(0, 1), BlockMove(1, 8)])
        kernels.copy_blocks(pool, [BlockMove(0, 2), BlockMove(5, 4)])
        kernels.copy_blocks(pool, [])
        device.synchronize()
        expected = original[:, [0, 4, 0, 3, 1, 1, 6, 7, 5]]
        assert torch.equal(pool.data, expected)


def canonical(made: Any) -> None:
    kernels, device = made.kernels, made.device
    pool = device.allocate_kv(kernels.layout(KVSpec(3, 2, 32, made.dtype, 16)), 7, host=False)
    data = torch.randn(2, 3, 4, 16, 2, 32).to(pool.data.dtype)
    kernels.write_blocks(pool, [5, 0, 3, 2], data)
    found = kernels.read_blocks(pool, [5, 0, 3, 2])
    assert found.device.type == "cpu"
    assert torch.equal(found, data)
    assert torch.equal(kernels.read_blocks(pool, [3]), data[:, :, 2:3])
    head_of_block = pool.data[1, 5, 1, 0].cpu()  # layer 1, block 5, values of head 0
    assert torch.equal(head_of_block, data[1, 1, 0, :, 0])


def no_slot(made: Any) -> None:
    sequences = Sequences(made, [16])
    before = sequences.pool.data.isnan().cpu()
    sequences.step([4], check=False, write=False)
    assert torch.equal(sequences.pool.data.isnan().cpu(), before)


def draws(made: Any, vocab: int = 300, spread: float = 2.0) -> None:
    """The drawing kernel against its definition, in every filter, gathered rows and bad rows.

    spread: of the logits. With little of it filters keep more tokens than are looked at by themselves.
    """
    where = made.device.torch_device
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)).to(where) * spread
    logits[4, 100:200] = logits[4].topk(5).values[-1]  # no filter parts them
    logits = logits.to(torch_dtype(made.dtype))
    tokens, bad, codes = made.kernels.draw(logits, None, None)
    assert tokens.tolist() == logits.float().argmax(-1).tolist()
    assert not bad.any()
    assert torch.equal(codes, tokens * 2)
    broken = logits.clone()
    broken[1, 7], broken[3] = float("nan"), float("-inf")
    tokens, bad, codes = made.kernels.draw(broken, None, None)
    assert bad.dtype == torch.bool
    assert bad.tolist() == [False, True, False, True, False]
    assert codes.dtype == torch.int64
    assert torch.equal(codes, tokens * 2 + bad)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocab

    filters = [(1.0, 1.0, 0.0, 0), (0.5, 0.8, 0.0, 0), (1.0, 1.0, 0.1, 0), (1.5, 1.0, 0.0, 9),
               (1.0, 0.9, 0.02, 40), (0.0, 1.0, 0.0, 0), (2.0, 1e-6, 0.0, 0), (1.0, 0.95, 0.0, 7),
               (0.7, 0.99, 0.0, vocab), (3.0, 0.999, 0.0, vocab - 1)]  # fmt: skip
    rows = torch.arange(len(filters)) % 5
    weights, wanted, numbers = [], [], []
    for row, (temperature, top_p, min_p, top_k) in zip(rows.tolist(), filters, strict=True):
        own = logits[row].cpu().double()
        weight = ((own - own.max()) / (temperature or 1.0)).exp()
        kept = weight >= min_p
        if top_k:
            kept &= weight >= weight.topk(top_k).values[-1]
        if top_p < 1:
            within = weight * (weight >= (weight.topk(top_k).values[-1] if top_k else 0.0))
            order = within.argsort(descending=True)
            before = within[order].cumsum(0) - within[order]
            kept &= weight >= within[order[int((before < top_p * within.sum()).sum()) - 1]]
        if not temperature:
            kept = torch.arange(vocab) == own.argmax()
        weights.append(torch.where(kept, weight, 0.0))
        share = weights[-1] / weights[-1].sum()
        wanted.append(int((share * (share < share.max())).argmax()) if temperature
                      and int(kept.sum()) > 1 else int(share.argmax()))  # fmt: skip
        middle = share.cumsum(0)[wanted[-1]] - share[wanted[-1]] / 2
        numbers.append(float(middle))
    columns = torch.tensor([[*own, number] for own, number in zip(filters, numbers, strict=True)])
    columns = columns.float().T.contiguous().to(where)
    tokens, bad, codes = made.kernels.draw(logits, rows.to(where), columns)
    assert tokens.tolist() == wanted
    assert not bad.any()
    assert torch.equal(codes, tokens * 2)
    columns[4, 0] = 0.5
    _, bad, codes = made.kernels.draw(broken, rows.to(where), columns)
    assert bad.tolist() == [row in (1, 3) for row in rows.tolist()]
    assert torch.equal(codes % 2, bad.long())
    for number in (0.0, 1.0 - 2.0**-24):  # the first and the last of what is kept
        columns[4] = number
        tokens, _, _ = made.kernels.draw(logits, rows.to(where), columns)
        for token, weight in zip(tokens.tolist(), weights, strict=True):
            kept = weight.nonzero()[:, 0].tolist()
            assert token in kept
            assert number > 0 or token == kept[0]


def changes(made: Any, vocab: int = 9_001) -> None:
    """Penalties and masks against their definition in fp64: with both, either, none; bad numbers stay."""
    where, rng = made.device.torch_device, torch.Generator().manual_seed(3)
    logits = (torch.randn(5, vocab, generator=rng) * 4).to(torch_dtype(made.dtype))
    logits[2, [3, vocab - 1]], logits[2, 4] = float("nan"), float("inf")
    words = -(-vocab // 32)
    seen = torch.rand(3, vocab, generator=rng) < 0.3
    answered = torch.where(seen, torch.randint(0, 4, (3, vocab), generator=rng), 0).float()
    allowed = torch.randint(-(2**31), 2**31, (2, words), generator=rng).int()
    rows = torch.tensor([4, 2, 2, 0, 1, 4])
    slots = torch.tensor([0, 2, -1, 1, -1, 0])
    masks = torch.tensor([-1, 1, 0, 0, -1, 1])
    penalties = torch.tensor([[1.3, 0.7, 1.0, 1.0, 1.0, 2.5], [0.4, 0.0, 0.0, 1.5, 0.0, -0.5],
                              [0.0, 0.6, 0.0, -2.0, 0.0, 0.25]])  # fmt: skip
    bits = (allowed.view(torch.uint8)[:, :, None] >> torch.arange(8) & 1).view(2, -1)[:, :vocab]

    def expected(number: int, slot: int, mask: int) -> Tensor:
        own = logits[rows[number]].double()
        repetition, frequency, presence = penalties[:, number].double()
        if slot >= 0:
            scaled = torch.where(own > 0, own / repetition, own * repetition)
            own = torch.where(seen[slot], scaled, own)
            own = own - frequency * answered[slot] - presence * (answered[slot] > 0)
        if mask >= 0:
            own = own.masked_fill((bits[mask] == 0) & ~own.isnan(), float("-inf"))
        return own

    def check(counts: tuple[Tensor, Tensor] | None, mask_bits: Tensor | None) -> None:
        own_slots = slots if counts is not None else torch.full_like(slots, -1)
        own_masks = masks if mask_bits is not None else torch.full_like(masks, -1)
        found = made.kernels.change(
            logits.to(where), rows.to(where), penalties.to(where), own_slots.to(where),
            None if counts is None else tuple(table.to(where) for table in counts),
            own_masks.to(where), None if mask_bits is None else mask_bits.to(where),
        )  # fmt: skip
        assert found.dtype == torch.float32
        pairs = zip(own_slots.tolist(), own_masks.tolist(), strict=True)
        wanted = torch.stack([expected(number, *pair) for number, pair in enumerate(pairs)])
        torch.testing.assert_close(
            found.cpu().double(), wanted, atol=2e-6, rtol=1e-6, equal_nan=True
        )

    for counts in ((seen, answered), None):
        for mask_bits in (allowed, None):
            check(counts, mask_bits)


def split_draws(made: Any) -> None:
    """Greedy rows that several programs share: the first of equal tokens, bad rows, gathered rows."""
    where, launcher = made.device.torch_device, made.kernels.drawing
    vocab = 10_000  # three chunks, the last one short
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(2))
    logits[0, [4095, 4096, 9999]] = 50.0  # the end of a chunk, the next one's start, the last token
    logits[1, 9999] = 50.0
    logits[2, 8192], logits[2, 5] = float("nan"), 50.0
    logits[3] = float("-inf")
    logits[4, [7, 9000]] = float("inf")
    logits[5] = -1.0
    logits = logits.to(torch_dtype(made.dtype)).to(where)
    rows = torch.tensor([5, 0, 2, 1, 4, 3, 0], device=where)
    bad = [False, False, True, False, True, True, False]
    wanted = [0, 4095, 5, 9999, 7, 0, 4095]
    for pieces in (1, 2, 3, 3, 64, None):  # twice: a launch leaves its tickets as it found them
        launcher.pieces = pieces
        tokens, found, codes = made.kernels.draw(logits, rows, None)
        assert tokens.tolist() == wanted, pieces
        assert found.tolist() == bad
        assert torch.equal(codes, 2 * tokens + found)
        tokens, found, _ = made.kernels.draw(logits, None, None)
        assert tokens.tolist() == [4095, 9999, 5, 0, 7, 0]
        assert found.tolist() == [False, False, True, True, True, False]
    assert launcher.split(1, vocab)[0] == 3
    assert launcher.split(100 * made.device.info.num_cores, vocab)[0] == 1


def shared_rows(made: Any, **shape: Any) -> None:
    """Rows that share blocks, read through a tile's first one's table: the others' entries are poison.

    Own keys whole (then they go on from what is shared) and split, what is shared whole and split.
    """
    launcher = made.kernels.launcher
    usual = launcher._num_splits, launcher._cores
    for splits, cores in ((1, 1000), (3, 1000)):
        launcher._num_splits, launcher._cores = splits, cores
        many_shared_rows(made, [5], **shape)
    launcher._num_splits, launcher._cores = usual


def many_shared_rows(made: Any, groups: list[int], **shape: Any) -> None:
    """Groups of rows, each with a prefix of its own in common, and one row alone; as above."""
    rng = np.random.default_rng(0)
    prefix = 272 // shape.get("block", 16) * shape.get("block", 16)
    lengths = [*(prefix + rng.integers(3, 60, sum(groups))).tolist(), 40]
    sequences = Sequences(made, lengths, **shape)
    shared, first, firsts = prefix // sequences.block, 0, []
    for count in groups:
        for row in range(first + 1, first + count):
            sequences.k[row][:prefix] = sequences.k[first][:prefix]
            sequences.v[row][:prefix] = sequences.v[first][:prefix]
            sequences.tables[row][:shared] = sequences.tables[first][:shared]
        firsts += range(first, first + count, SharedRows.WIDTH)  # of each tile
        first += count
    for row, length in enumerate(lengths):
        sequences.fill(row, length - 2)
    plain = sequences.batch
    where = made.device.torch_device
    unowned = (
        set(range(sequences.pool.num_blocks)) - set(itertools.chain(*sequences.tables))
    ).pop()
    others = [row for row in range(first) if row not in firsts]

    def batch(*arguments: Any) -> StepBatch:
        found = plain(*arguments)
        starts = found.seq_lens.cpu().numpy().astype(np.int64) - 1
        tables = found.block_tables.cpu().numpy()
        arrays = find_shared_rows(tables, starts, sequences.block)
        assert arrays is not None
        assert arrays[2].tolist() == [prefix] * first + [0]
        poisoned = found.block_tables.clone()
        poisoned[others, :shared] = unowned  # NaN: whoever reads it shows it
        on = [torch.from_numpy(array).to(where) for array in arrays]
        return replace(found, shared=SharedRows(*on), block_tables=poisoned)

    sequences.batch = batch  # type: ignore[method-assign]
    sequences.step([1] * len(lengths))
    sequences.step([1] * len(lengths))


def skinny_linears(made: Any) -> None:
    """Both forms of the linear for few rows against fp64: odd sizes, splits, everything fused."""
    from halyard.hal.kernels.triton.skinny import Plan, SkinnyLinears

    where, dtype = made.device.torch_device, torch_dtype(made.dtype)
    linears, generator = SkinnyLinears(), torch.Generator().manual_seed(3)
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(where)

    def check(plan: Plan, rows: int, inputs: int, **options: Any) -> None:
        outputs = 50  # no whole tiles
        weight = random(outputs, inputs)
        gated = options.get("gated", False)
        x = random(rows, inputs * (2 if gated else 1))
        fused = {name: random(*shape) for name, shape in options.items() if name != "gated"}
        h = x.double()
        if gated:
            h = torch.nn.functional.silu(h[:, :inputs]) * h[:, inputs:]
        if "norm" in fused:
            h = h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5) * fused["norm"].double()
        truth = h @ weight.double().T
        for name in ("bias", "residual"):
            truth += fused[name].double() if name in fused else 0.0
        for _ in range(2):  # again: a launch leaves the workspace as it found it
            out = torch.full((rows, outputs), float("nan"), dtype=dtype, device=where)
            linears.multiply(plan, x, weight, **fused, eps=1e-5, gated=gated, out=out)
            error = (out.double() - truth).abs().max() / truth.abs().max()
            assert error <= limit, (plan, rows, inputs, options, float(error))
        again = linears.multiply(plan, x, weight, **fused, eps=1e-5, gated=gated)
        assert torch.equal(again, out)

    few, staged = Plan("few", 16, 128, 4, 1), Plan("few", 16, 64, 4, 3)
    for rows in (1, 2, 3, 4):
        check(few, rows, 256, norm=(256,), residual=(rows, 50))
    check(staged, 2, 200, bias=(50,), gated=True)
    check(few, 1, 200, norm=(200,), gated=True, bias=(50,), residual=(1, 50))
    for rows, inputs, splits in ((1, 256, 3), (5, 200, 1), (16, 200, 3)):
        check(Plan("rows", 32, 64, 4, 2, splits), rows, inputs, bias=(50,), residual=(rows, 50))


def gates(made: Any) -> None:
    """The gate alone against fp64: odd widths, both activations, numbers of any size."""
    from halyard.hal.kernels.triton.gated import gate

    where, dtype = made.device.torch_device, torch_dtype(made.dtype)
    limit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    generator = torch.Generator().manual_seed(5)
    for rows, outputs in ((0, 8), (1, 1), (3, 1000), (2, 2050)):
        y = (torch.randn(rows, 2 * outputs, generator=generator) * 8).to(dtype)
        y[:, :1] = -200.0  # exp overflows
        first, second = y.double().chunk(2, -1)
        for gelu in (False, True):
            act = torch.nn.functional.gelu(first, approximate="tanh") if gelu else None
            truth = (torch.nn.functional.silu(first) if act is None else act) * second
            found = gate(y.to(where), gelu).double().cpu()
            torch.testing.assert_close(found, truth, atol=limit, rtol=limit)


# tokens, query heads, key heads, dim, (tokens, parts of the heads) of a program or None: the shape's.
ROTATIONS: list[tuple[int, int, int, int, tuple[int, int] | None]] = [
    (0, 5, 1, 64, None), (1, 1, 1, 16, None), (3, 5, 1, 80, None), (17, 32, 8, 128, None),
    (17, 32, 2, 96, None), (130, 5, 2, 64, None), (3, 1, 8, 16, None), (3, 64, 8, 256, None),
    (17, 5, 2, 80, (4, 3)), (3, 32, 8, 64, (2, 4)), (130, 1, 2, 128, (16, 1)), (1, 5, 1, 96, (2, 8)),
]  # fmt: skip


def rotations(made: Any) -> None:
    """Queries and keys out of one product, by angles whose halves differ, against fp64."""
    from halyard.hal.kernels.triton.rotary import RotaryTile, rotate

    where, dtype = made.device.torch_device, torch_dtype(made.dtype)
    half_step = torch.finfo(dtype).eps / 2  # rounded once, of what fp32 makes of it
    generator = torch.Generator().manual_seed(6)
    for tokens, heads, kv_heads, dim, parts in ROTATIONS:
        product = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
        angles = torch.randn(2, tokens, 3 * dim, generator=generator).to(dtype)
        q, k, _ = product.to(where).split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
        q, k = q.unflatten(-1, (heads, dim)), k.unflatten(-1, (kv_heads, dim))
        if parts is not None:  # of a product of its own
            k = torch.cat((k, k), 1)[:, kv_heads:]
        cos, sin = angles.to(where)[:, :, dim : 2 * dim]
        tile = None if parts is None else RotaryTile(*parts, 4)
        for x, found in zip((q, k), rotate(q, k, cos, sin, tile), strict=True):
            wide, by_cos, by_sin = (part.double().cpu() for part in (x, cos, sin))
            first, second = wide.chunk(2, -1)
            terms = (
                wide * by_cos.unsqueeze(1),
                torch.cat((-second, first), -1) * by_sin.unsqueeze(1),
            )
            truth = terms[0] + terms[1]
            bound = half_step * truth.abs() + 2e-7 * (terms[0].abs() + terms[1].abs())
            bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert found.is_contiguous()
            assert found.dtype == dtype
            assert found.shape == x.shape
            assert ((found.double().cpu() - truth).abs() <= bound).all()
