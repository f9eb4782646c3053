"""L2: what is written to a block is there, wherever the block goes, and nothing else changes."""

from __future__ import annotations

import torch

from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.hal.conformance.sequences import Sequences
from halyard.hal.dtypes import torch_dtype
from halyard.hal.types import BlockMove, DType, KVPool, KVSpec, Requirements

__all__ = ["cases"]

LAYERS, KV_HEADS, DIM, BLOCK = 3, 2, 64, 16


def cases(backend: BackendUnderTest) -> list[Case]:
    """Cases for every dtype; the null kernels store nothing."""
    if not backend.computes:
        return []
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        need = Requirements(dtype, dtype, BLOCK, 4, KV_HEADS, DIM)
        for name, run in (
            ("write_then_read", _write_then_read),
            ("read_gives_what_attend_wrote", _attend_then_read),
            ("attend_uses_what_write_wrote", _write_then_attend),
            ("copy", _copy),
            ("swap_out_and_in", _swap),
            ("many_moves", _many_moves),
            ("no_moves", _no_moves),
            ("moves_and_attends_are_ordered", _ordered),
            ("fork_then_part", _fork),
            ("truncate_then_go_on", _truncate),
            ("nothing_else_is_written", _stray_writes),
            ("no_slot_no_write", _no_slot),
            ("blocks_are_portable", _portable),
        ):
            found.append(Case("L2", name, run, dtype, need, quick=name != "many_moves"))
        if backend.offers("writes_alone"):
            found.append(Case("L2", "written_alone", _written_alone, dtype, need, quick=True))
    return found


def _pools(context: CaseContext, device_blocks: int, host_blocks: int) -> tuple[KVPool, KVPool]:
    layout = context.kernels.layout(KVSpec(LAYERS, KV_HEADS, DIM, context.dtype, BLOCK))
    pools = (
        context.device.allocate_kv(layout, device_blocks, host=False),
        context.device.allocate_kv(layout, host_blocks, host=True),
    )
    for pool in pools:
        pool.data.fill_(float("nan"))
    return pools


def _contents(dtype: DType, blocks: int, seed: int = 0) -> torch.Tensor:
    """Random canonical blocks: [2, layers, blocks, block, kv_heads, dim]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, LAYERS, blocks, BLOCK, KV_HEADS, DIM)
    return torch.randn(shape, generator=generator).to(torch_dtype(dtype))


def _expect(context: CaseContext, pool: KVPool, blocks: list[int], data: torch.Tensor) -> None:
    found = context.kernels.read_blocks(pool, blocks).cpu()
    context.require(found.dtype == data.dtype, f"read_blocks gives {found.dtype}")
    context.require(found.shape == data.shape, f"read_blocks gives the shape {list(found.shape)}")
    wrong = [
        block for n, block in enumerate(blocks) if not torch.equal(found[:, :, n], data[:, :, n])
    ]
    where = "host" if pool.host else "device"
    context.require(not wrong, f"{where} blocks {wrong} do not hold what they should, bit for bit")


def _write_then_read(context: CaseContext) -> None:
    pool, host = _pools(context, 7, 4)
    data = _contents(context.dtype, 4)
    context.kernels.write_blocks(pool, [5, 0, 3, 2], data)
    _expect(context, pool, [5, 0, 3, 2], data)
    _expect(context, pool, [3], data[:, :, 2:3])
    context.kernels.write_blocks(host, [2], data[:, :, :1])
    _expect(context, host, [2], data[:, :, :1])


def _attend_then_read(context: CaseContext) -> None:
    sequences = Sequences(context, [20, 33])
    sequences.step([20, 32])
    sequences.step([0, 1])
    for row, length in enumerate((20, 33)):
        keys, values = sequences.stored(row)
        same = torch.equal(keys, sequences.k[row][:length])
        context.require(same, f"the keys of row {row} are not those that were given")
        same = torch.equal(values, sequences.v[row][:length])
        context.require(same, f"the values of row {row} are not those that were given")


def _written_alone(context: CaseContext) -> None:
    """Keys and values that came without an attention are stored, and attended to by single tokens
    of the same step as by those of the next."""
    sequences = Sequences(context, [41, 34, 200])
    sequences.write([25, 33, 198])
    sequences.write([15, 0, 0])
    for row, length in enumerate((40, 33, 198)):
        for name, stored, given in zip(
            ("keys", "values"), sequences.stored(row), (sequences.k, sequences.v), strict=True
        ):
            same = torch.equal(stored, given[row][:length])
            context.require(same, f"the {name} of row {row} are not those that were given")
    sequences.done = [39, 32, 197]
    sequences.step([1, 1, 1], write=False)
    sequences.step([1, 1, 1])


def _write_then_attend(context: CaseContext) -> None:
    sequences = Sequences(context, [41, 18])
    sequences.fill(0, 40)
    sequences.fill(1, 17)
    sequences.step([1, 1])


def _copy(context: CaseContext) -> None:
    pool, _ = _pools(context, 8, 1)
    data = _contents(context.dtype, 4)
    context.kernels.write_blocks(pool, [0, 1, 2, 3], data)
    context.kernels.copy_blocks(pool, [BlockMove(1, 6), BlockMove(3, 4)])
    _expect(context, pool, [0, 1, 2, 3, 6, 4], data[:, :, [0, 1, 2, 3, 1, 3]])


def _swap(context: CaseContext) -> None:
    pool, host = _pools(context, 6, 5)
    data = _contents(context.dtype, 3)
    context.kernels.write_blocks(pool, [4, 1, 2], data)
    context.kernels.swap_out(pool, host, [BlockMove(4, 3), BlockMove(1, 0), BlockMove(2, 4)])
    _expect(context, host, [3, 0, 4], data)
    _expect(context, pool, [4, 1, 2], data)
    context.kernels.write_blocks(pool, [4, 1, 2], _contents(context.dtype, 3, seed=9))
    context.kernels.swap_in(pool, host, [BlockMove(3, 0), BlockMove(0, 5), BlockMove(4, 1)])
    _expect(context, pool, [0, 5, 1], data)
    _expect(context, host, [3, 0, 4], data)


def _many_moves(context: CaseContext) -> None:
    count = 150
    pool, host = _pools(context, 2 * count, count)
    data = _contents(context.dtype, count)
    generator = torch.Generator().manual_seed(1)
    there = torch.randperm(count, generator=generator).tolist()
    back = (torch.randperm(count, generator=generator) + count).tolist()
    context.kernels.write_blocks(pool, list(range(count)), data)
    context.kernels.swap_out(pool, host, [BlockMove(n, there[n]) for n in range(count)])
    context.kernels.swap_in(pool, host, [BlockMove(there[n], back[n]) for n in range(count)])
    _expect(context, pool, back, data)
    context.kernels.copy_blocks(pool, [BlockMove(back[n], n) for n in range(count)])
    _expect(context, pool, list(range(count)), data)


def _no_moves(context: CaseContext) -> None:
    pool, host = _pools(context, 2, 2)
    data = _contents(context.dtype, 2)
    context.kernels.write_blocks(pool, [0, 1], data)
    context.kernels.copy_blocks(pool, [])
    context.kernels.swap_out(pool, host, [])
    context.kernels.swap_in(pool, host, [])
    _expect(context, pool, [0, 1], data)


def _ordered(context: CaseContext) -> None:
    """A move is seen by the next attend, an attend's writes by the next move, without waiting."""
    sequences = Sequences(context, [31])
    _, host = _pools(context, 1, 1)
    layout = sequences.pool.layout
    host = context.device.allocate_kv(layout, 4, host=True)
    sequences.step([30])
    old = sequences.tables[0]
    spare = [b for b in range(sequences.pool.num_blocks) if b not in old][:2]
    kernels, pool = context.kernels, sequences.pool
    kernels.swap_out(pool, host, [BlockMove(old[0], 2), BlockMove(old[1], 0)])
    kernels.swap_in(pool, host, [BlockMove(2, spare[0]), BlockMove(0, spare[1])])
    sequences.tables[0] = spare
    sequences.step([1])
    kernels.copy_blocks(pool, [BlockMove(spare[1], old[0])])
    sequences.tables[0] = [spare[0], old[0]]
    keys, _ = sequences.stored(0)
    context.require(torch.equal(keys, sequences.k[0]), "a move did not see an attend's writes")


def _fork(context: CaseContext) -> None:
    """Two sequences share a full block and a copy of a partly filled one, then go their own ways."""
    sequences = Sequences(context, [20, 23])
    sequences.step([20, 0])
    for own in (sequences.q, sequences.k, sequences.v):
        own[1][:20] = own[0]
    own_block = sequences.tables[1][1]
    context.kernels.copy_blocks(sequences.pool, [BlockMove(sequences.tables[0][1], own_block)])
    sequences.tables[1] = [sequences.tables[0][0], own_block]
    sequences.done[1] = 20
    sequences.step([0, 3])
    keys, values = sequences.stored(0)
    same = torch.equal(keys, sequences.k[0]) and torch.equal(values, sequences.v[0])
    context.require(same, "what the fork wrote appeared in the sequence it came from")


def _truncate(context: CaseContext) -> None:
    """Tokens are taken back and others written in their places."""
    sequences = Sequences(context, [37])
    sequences.step([35])
    sequences.done[0] = 18
    generator = torch.Generator().manual_seed(5)
    for own in (sequences.q, sequences.k, sequences.v):
        own[0][18:] = torch.randn(own[0][18:].shape, generator=generator).to(own[0].dtype)
    sequences.step([2])
    sequences.step([1])
    keys, _ = sequences.stored(0)
    context.require(torch.equal(keys, sequences.k[0][:21]), "rewritten slots hold old keys")


def _stray_writes(context: CaseContext) -> None:
    """An attend writes the slots it was given, in its own layer, and no other."""
    sequences = Sequences(context, [20, 5], layers=3, layer_index=1)
    sequences.step([19, 5])
    sequences.step([1, 0])
    pool = sequences.pool
    everything = context.kernels.read_blocks(pool, list(range(pool.num_blocks))).cpu()
    written = torch.zeros(everything.shape[:4], dtype=torch.bool)
    for row, length in enumerate((20, 5)):
        for position in range(length):
            block = sequences.tables[row][position // BLOCK]
            written[:, 1, block, position % BLOCK] = True
    touched = ~everything.isnan().flatten(4).all(dim=-1)
    context.require(not (touched & ~written).any().item(), "slots were written that had to be left")
    context.require(not (written & ~touched).any().item(), "slots were left that had to be written")


def _no_slot(context: CaseContext) -> None:
    sequences = Sequences(context, [16])
    before = context.kernels.read_blocks(sequences.pool, list(range(sequences.pool.num_blocks)))
    sequences.step([4], check=False, write=False)
    after = context.kernels.read_blocks(sequences.pool, list(range(sequences.pool.num_blocks)))
    same = torch.equal(before.cpu().isnan(), after.cpu().isnan())
    context.require(same, "tokens without a slot were written somewhere")


def _portable(context: CaseContext) -> None:
    """Canonical blocks that other kernels wrote go on here, and the other way round."""
    from halyard.hal.devices.cpu import CpuDevice
    from halyard.hal.kernels.reference.kernels import ReferenceKernels

    host = CpuDevice()
    mine = Sequences(context, [45])
    other_context = type(context)(
        context.case, context.backend, host, ReferenceKernels(host), context.compiler
    )
    other = Sequences(other_context, [45])
    other.step([43])
    mine.kernels.write_blocks(
        mine.pool, mine.tables[0], other.kernels.read_blocks(other.pool, other.tables[0])
    )
    mine.done[0] = 43
    mine.step([1])
    other.kernels.write_blocks(
        other.pool, other.tables[0], mine.kernels.read_blocks(mine.pool, mine.tables[0]).cpu()
    )
    other.done[0] = 44
    other.step([1])
