"""The Triton kernels and their device on a real GPU: numerics, moves, captured steps, memory."""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halyard.hal.devices.cuda import CudaDevice
from halyard.hal.devices.rocm import RocmDevice
from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import CapacityError
from halyard.hal.kernels.triton import gated, rotary
from halyard.hal.kernels.triton.skinny import (
    Plan,
    SkinnyLinears,
    linear_add,
    linear_add_,
    skinny_linear,
)
from halyard.hal.types import BlockMove, DType, KVSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conformance"))

KIND = RocmDevice if torch.version.hip else CudaDevice
PROBE = KIND.probe()
pytestmark = pytest.mark.skipif(
    not PROBE.available, reason="no GPU here: " + "; ".join(PROBE.reasons)
)
if PROBE.available:
    pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

import triton_checks as checks  # noqa: E402
import triton_expert_checks as expert_checks  # noqa: E402

from halyard.hal.conformance.sequences import Sequences  # noqa: E402

DTYPES: tuple[DType, ...] = ("bfloat16", "float16", "float32")


@pytest.fixture(scope="module")
def device() -> Any:
    opened = KIND()
    yield opened
    opened.close()
    opened.close()  # idempotent


def test_info_is_filled_at_open(device: Any) -> None:
    assert device.info.num_cores > 0
    assert device.info.memory_bytes > 1 << 30
    assert device.info.arch == PROBE.info.arch  # type: ignore[union-attr]
    assert abs(device.info.num_cores - PROBE.info.num_cores) <= device.info.num_cores // 4  # type: ignore[union-attr]
    memory = device.memory()
    assert 0 < memory.free <= memory.total


@pytest.mark.parametrize("name", list(checks.SHAPES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_then_decode(device: Any, dtype: DType, name: str) -> None:
    checks.prefill_then_decode(checks.context(device, dtype), **checks.SHAPES[name])


@pytest.mark.parametrize("splits", [2, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_keys_are_merged(device: Any, dtype: DType, splits: int) -> None:
    context = checks.context(device, dtype, num_splits=splits)
    checks.prefill_then_decode(context, **checks.SHAPES["gqa"])
    checks.prefill_then_decode(context, **checks.SHAPES["all_features"])


@pytest.mark.parametrize("name", ["gqa", "window_33", "all_features", "block_128"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed(device: Any, dtype: DType, name: str) -> None:
    checks.mixed(checks.context(device, dtype), **checks.SHAPES[name])
    checks.long_mixed(checks.context(device, dtype), **checks.SHAPES[name])
    checks.filled_up(checks.context(device, dtype), **checks.SHAPES[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(device: Any, dtype: DType) -> None:
    if dtype == "float32":  # in 16 bits tokens tie: that is what the next one looks at
        checks.draws(checks.context(device, dtype))
        for spread in (0.2, 1.0, 4.0, 15.0):
            checks.draws(checks.context(device, dtype), 9_001, spread)
    checks.split_draws(checks.context(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_changes(device: Any, dtype: DType) -> None:
    checks.changes(checks.context(device, dtype))
    checks.changes(checks.context(device, dtype), vocab=128_256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(device: Any, dtype: DType) -> None:
    expert_checks.experts(checks.context(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest(device: Any, dtype: DType) -> None:
    expert_checks.largest(checks.context(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_skinny_linears(device: Any, dtype: DType) -> None:
    checks.skinny_linears(checks.context(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(device: Any, dtype: DType) -> None:
    checks.gates(checks.context(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations(device: Any, dtype: DType) -> None:
    checks.rotations(checks.context(device, dtype))


def test_any_number_of_tokens_is_rotated_by_one_kernel(device: Any) -> None:
    """None is compiled anew where a step is another's size."""
    from halyard.hal.kernels.triton.rotary_kernel import rotate_kernel

    built = []
    for tokens in (1, 2, 16, 17, 8448):
        product = torch.randn(tokens, 48 * 64, device="cuda").to(torch.bfloat16)
        q, k, _ = product.unflatten(-1, (48, 64)).split([32, 8, 8], 1)
        rotary.rotate_pair(q, k, *product[:, :128].chunk(2, -1))
        built.append(sum(len(kept[0]) for kept in rotate_kernel.device_caches.values()))
    assert built == built[:1] * len(built)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gated_products(device: Any, dtype: DType, gelu: bool) -> None:
    """Against fp64, by the kernel for Hopper (where the GPU is one) and by the two of all GPUs."""
    kind, bound = torch_dtype(dtype), {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    cores = gated._cores(torch.device("cuda", 0))
    for rows, inputs, outputs in ((1, 64, 128), (130, 2048, 384), (129, 200, 128), (5000, 512, 1024),
                                  (3000, 1024, 256)):  # fmt: skip
        x = torch.randn(rows, inputs).to(kind).cuda()
        weight = (torch.randn(2 * outputs, inputs) / inputs**0.5).to(kind).cuda()
        first, second = (x.double() @ weight.double().T).chunk(2, -1)
        act = torch.nn.functional.gelu(first, approximate="tanh") if gelu else None
        truth = (torch.nn.functional.silu(first) if act is None else act) * second
        ways = [gated.gated_product(x, weight, gelu)]
        if cores:
            ways += [gated.gated_on_hopper(x, weight, gelu, number) for number in (cores, 7)]
        for found in ways:
            assert (found.double() - truth).abs().max() <= bound * truth.abs().max()
        assert len(ways) < 3 or torch.equal(ways[1], ways[2])


def test_a_captured_gated_product_replays(device: Any) -> None:
    weight = (torch.randn(4096, 512) / 20).to(torch.bfloat16).cuda()
    x = torch.zeros(8192, 512, dtype=torch.bfloat16, device="cuda")
    out: list[torch.Tensor] = []
    replay = device.capture(lambda: out.append(gated.gated_product(x, weight, False)))
    assert replay is not None
    for seed in range(3):
        x.copy_(torch.randn(8192, 512, generator=torch.Generator().manual_seed(seed)))
        replay()
        first, second = (x.double() @ weight.double().T).chunk(2, -1)
        truth = torch.nn.functional.silu(first) * second
        assert (out[-1].double() - truth).abs().max() <= 1.6e-2 * truth.abs().max()


def test_a_captured_linear_of_split_inputs_replays(device: Any) -> None:
    linears = SkinnyLinears()
    x = torch.zeros(3, 2048, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(2048, 2048).to(torch.bfloat16).cuda()
    out = torch.empty(3, 2048, dtype=torch.bfloat16, device="cuda")
    plan = Plan("rows", 32, 256, 4, 4, 4)
    replay = device.capture(lambda: linears.multiply(plan, x, weight, out=out))
    assert replay is not None
    for seed in range(3):
        x.copy_(torch.randn(3, 2048, generator=torch.Generator().manual_seed(seed)))
        out.fill_(float("nan"))
        replay()
        truth = x.double() @ weight.double().T
        assert (out.double() - truth).abs().max() <= 1e-2 * truth.abs().max()


def test_the_linear_operator_serves_any_number_of_rows(device: Any) -> None:
    weight = (torch.randn(768, 1024) / 32).to(torch.bfloat16).cuda()
    bias = torch.randn(768).to(torch.bfloat16).cuda()
    for shape in ((0, 1024), (1, 1024), (1, 3, 1024), (16, 1024), (40, 1024)):
        x = torch.randn(shape).to(torch.bfloat16).cuda()
        found = skinny_linear(x, weight, bias)
        wanted = torch.nn.functional.linear(x, weight, bias)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_adds_to_any_number_of_rows_in_place(device: Any, dtype: DType) -> None:
    kind, bound = torch_dtype(dtype), {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for outputs, inputs in ((768, 1024), (2048, 8192), (96, 80)):
        weight = (torch.randn(outputs, inputs) / inputs**0.5).to(kind).cuda()
        for shape in ((0,), (1,), (1, 3), (16,), (17,), (1, 300)):
            x = torch.randn(*shape, inputs).to(kind).cuda()
            residual = torch.randn(*shape, outputs).to(kind).cuda()
            truth = residual.double() + x.double() @ weight.double().T
            apart = linear_add(residual, x, weight)
            linear_add_(residual, x, weight)
            for found in (residual, apart):
                error = (found.double() - truth).abs() / truth.abs().clamp(min=1)
                assert not error.numel() or error.max() <= bound, (outputs, shape)


@pytest.mark.parametrize("swap", ["kernel", "staged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_and_blocks(device: Any, dtype: DType, swap: str) -> None:
    context = checks.context(device, dtype, swap=swap)
    checks.moves(context)
    with device.beside(False):
        checks.moves(context)
    checks.canonical(context)
    checks.no_slot(context)


@pytest.mark.parametrize("side", [False, True])
def test_swaps_of_many_pieces_follow_each_other(device: Any, side: bool) -> None:
    """Buffers of three blocks: pieces and whole swaps take turns in them, and nobody waits."""
    from halyard.hal.kernels.triton.staging import StagedSwap

    kernels = checks.context(device, "bfloat16").kernels
    layout = kernels.layout(KVSpec(3, 2, 64, "bfloat16"))
    pool = device.allocate_kv(layout, 60, host=False)
    host = device.allocate_kv(layout, 60, host=True)
    staged = StagedSwap(device.torch_device, 3 * layout.bytes_per_block)
    assert staged.takes(host)
    pool.data.normal_()
    original = pool.data.clone()
    shuffled = random.Random(0).sample(range(60), 60)
    there = list(zip(range(60), shuffled, strict=True))
    back = [(block, shuffled[(block + 1) % 60]) for block in range(60)]
    with device.beside(False) if side else nullcontext():
        for _ in range(5):
            staged.swap_out(pool, host, there)
            pool.data.zero_()
            staged.swap_in(pool, host, back)  # each block in the place of the one before
    device.synchronize()
    expected = original[:, [(block + 5) % 60 for block in range(60)]]
    assert torch.equal(pool.data, expected)


def test_host_pools_are_pinned_and_in_reach(device: Any) -> None:
    kernels = checks.context(device, "bfloat16").kernels
    host = device.allocate_kv(kernels.layout(KVSpec(2, 2, 64, "bfloat16")), 5, host=True)
    assert host.data.device.type == "cpu"
    assert host.data.is_pinned()
    assert kernels._in_reach(host)


def test_too_large_a_pool_is_refused_in_one_line(device: Any) -> None:
    layout = checks.context(device, "bfloat16").kernels.layout(KVSpec(32, 8, 128, "bfloat16"))
    for host in (False, True):
        with pytest.raises(CapacityError, match="ask for fewer") as caught:
            device.allocate_kv(layout, 1 << 24, host=host)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context_length", [40, 3000])
def test_a_captured_step_replays_with_other_lengths(device: Any, context_length: int) -> None:
    """One graph, then the same rows one token longer, then other rows in other blocks."""
    context = checks.context(device, "bfloat16")
    lengths = [context_length, 17, context_length // 2]
    sequences = Sequences(context, [n + 3 for n in lengths])
    for row, length in enumerate(lengths):
        sequences.fill(row, length)

    def inputs() -> tuple[Any, ...]:
        rows = range(len(lengths))
        spans = [(done, done + 1) for done in sequences.done]
        batch = sequences.batch(rows, spans)  # type: ignore[arg-type]
        packed = (sequences.packed(x, rows, spans) for x in (sequences.q, sequences.k, sequences.v))  # type: ignore[arg-type]
        return batch, *packed

    batch, q, k, v = inputs()
    width = batch.block_tables.shape[1]
    assert width * sequences.block >= max(lengths) + 3
    tables = batch.block_tables.clone()
    static = replace(batch, block_tables=tables, max_seq_len=width * sequences.block)
    out: list[Any] = [None]

    def step() -> None:
        out[0] = context.kernels.attend(q, k, v, sequences.pool, sequences.layer, static)

    replay = device.capture(step)
    assert replay is not None
    for _ in range(3):
        fresh, new_q, new_k, new_v = inputs()
        for old, new in ((q, new_q), (k, new_k), (v, new_v)):
            old.copy_(new)
        for name in ("positions", "slot_mapping", "seq_lens", "query_start"):
            getattr(static, name).copy_(getattr(fresh, name))
        tables.copy_(fresh.block_tables)
        replay()
        device.synchronize()
        host = out[0].cpu()
        for row in range(len(lengths)):
            last = sequences.done[row] = sequences.done[row] + 1
            sequences._compare(row, last - 1, last, host[row : row + 1])


def test_what_cannot_be_captured_is_none(device: Any) -> None:
    value = torch.ones(1, device="cuda")
    assert device.capture(lambda: value.item() and None) is None
    assert torch.randn(8, device=value.device).isfinite().all()  # torch's own state is in order
    assert (value + 1).item() == 2.0  # the device goes on


def test_moves_beside_a_step_wait_for_what_came_before_its_mark(device: Any) -> None:
    """The step goes on while blocks move; what comes after the moves sees them."""
    context = checks.context(device, "bfloat16")
    layout = context.kernels.layout(KVSpec(4, 8, 128, "bfloat16"))
    pool = device.allocate_kv(layout, 300, host=False)
    host = device.allocate_kv(layout, 300, host=True)
    host.data.zero_()
    weight = torch.full((8192, 8192), 0.25, dtype=torch.bfloat16, device="cuda")
    pool.data.zero_()
    moves = [BlockMove(block, block) for block in range(256)]
    with device.beside(False):
        context.kernels.swap_out(pool, host, moves)  # what is compiled first takes its time
    for value in (1.0, 2.0):
        torch.mm(weight, weight)  # long enough that a move that didn't wait would be seen
        pool.data.fill_(value)
        device.mark()
        ended = torch.cuda.Event()
        for _ in range(60):
            torch.mm(weight, weight)
        ended.record()
        with device.beside(True):
            context.kernels.swap_out(pool, host, moves)
            moved = torch.cuda.Event()
            moved.record()
        pool.data.fill_(-1.0)  # the next step's writes
        moved.synchronize()
        assert not ended.query()  # the products still run
        device.synchronize()
        assert bool((host.data[:, :256] == value).all())


def test_a_move_and_an_attend_follow_each_other_without_waiting(device: Any) -> None:
    context = checks.context(device, "bfloat16")
    sequences = Sequences(context, [31])
    host = device.allocate_kv(sequences.pool.layout, 4, host=True)
    sequences.step([30])
    old = sequences.tables[0]
    spare = [b for b in range(sequences.pool.num_blocks) if b not in old][:2]
    context.kernels.swap_out(sequences.pool, host, [BlockMove(old[0], 2), BlockMove(old[1], 0)])
    context.kernels.swap_in(sequences.pool, host, [BlockMove(2, spare[0]), BlockMove(0, spare[1])])
    sequences.tables[0] = spare
    sequences.step([1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("block", [16, 128])
def test_long_prompts(device: Any, dtype: DType, block: int) -> None:
    """Whole and in chunks, beside rows of one query; on Hopper by warpgroups that share keys."""
    context = checks.context(device, dtype)
    launcher: Any = context.kernels.launcher
    sequences = Sequences(
        context, [1680, 1100, 901, 130, 40], heads=32, kv_heads=8, dim=128, block=block, layers=1
    )
    sequences.fill(1, 300)
    sequences.fill(2, 898)
    variant = launcher._variant(sequences.layer, 2, block)
    for counts in ([820, 0, 0, 0, 0], [30, 799, 1, 95, 0], [830, 1, 1, 35, 40]):
        if variant.wide is not None:
            batch = SimpleNamespace(num_tokens=sum(counts), num_rows=sum(map(bool, counts)))
            assert launcher._takes_wide(variant.shape, variant.wide, batch)
        sequences.step(counts)


@pytest.mark.parametrize("heads", [32, 40])
@pytest.mark.parametrize(("dtype", "block"), [("bfloat16", 16), ("float16", 128)])
def test_many_rows_that_share(device: Any, dtype: DType, block: int, heads: int) -> None:
    """Two prefixes; on Hopper by warpgroups that share keys, two tiles of rows or two halves of one."""
    context = checks.context(device, dtype)
    launcher: Any = context.kernels.launcher
    shape = {"heads": heads, "kv_heads": 8, "dim": 128, "block": block, "layers": 1}
    checks.many_shared_rows(context, [90, 37], **shape)  # 128 rows with the one alone
    for variant in launcher._variants.values():
        if launcher._hopper_wide_shared is not None:
            assert launcher._takes_wide_shared(SimpleNamespace(num_rows=128), variant) is not None
    for few in ("gqa", "gqa_3", "dim_128", "block_128"):
        checks.shared_rows(context, **checks.SHAPES[few])
