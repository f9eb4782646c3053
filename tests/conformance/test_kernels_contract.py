"""Kernel sets against an independent fp64 oracle: same inputs, every shape the contract names."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native.kernels import NativeKernels
from halyard.hal.kernels.native.library import supported_isas
from halyard.hal.kernels.reference.kernels import ReferenceKernels
from halyard.hal.types import AttentionLayer, BlockMove, KVPool, KVSpec, StepBatch

DEVICE = CpuDevice()
ISAS = supported_isas(DEVICE.info.features)
KERNELS = {"reference": lambda: ReferenceKernels(DEVICE)} | {
    f"native-{isa}": (lambda isa=isa: NativeKernels(DEVICE, isa)) for isa in ISAS
}
LENGTHS = [1, 15, 16, 17, 97]


@pytest.fixture(params=list(KERNELS))
def kernels(request: pytest.FixtureRequest) -> Any:
    return KERNELS[request.param]()


class Case:
    """Sequences with random keys, values and queries, in permuted blocks of a poisoned pool."""

    def __init__(
        self,
        kernels: Any,
        lengths: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        dtype: torch.dtype = torch.float32,
        block: int = 16,
        layers: int = 2,
        seed: int = 0,
        **layer: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kernels, self.block, self.dtype = kernels, block, dtype
        name = "float32" if dtype == torch.float32 else "bfloat16"
        spec = KVSpec(layers, kv_heads, dim, name, block)
        needed = sum(-(-n // block) for n in lengths)
        self.pool: KVPool = DEVICE.allocate_kv(kernels.layout(spec), needed + 3, host=False)
        self.pool.data.fill_(float("nan"))
        ids = list(range(needed + 3))
        random.Random(seed).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(-(-n // block))] for n in lengths]
        self.lengths = lengths
        self.done = [0] * len(lengths)

        def draw(count: int, h: int) -> torch.Tensor:
            return torch.randn(count, h, dim, generator=generator).to(dtype)

        self.q = [draw(n, heads) for n in lengths]
        self.k = [draw(n, kv_heads) for n in lengths]
        self.v = [draw(n, kv_heads) for n in lengths]
        sinks = layer.pop("sinks", False)
        self.layer = AttentionLayer(
            index=layers - 1,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            scale=dim**-0.5,
            sinks=torch.randn(heads, generator=generator) if sinks else None,
            **layer,
        )

    def step(self, counts: list[int]) -> None:
        """Compute `counts[i]` more tokens of sequence i and compare with the oracle."""
        rows = [i for i, count in enumerate(counts) if count]
        spans = [(self.done[i], self.done[i] + counts[i]) for i in rows]
        slots, positions, starts = [], [], [0]
        for row, (first, last) in zip(rows, spans, strict=True):
            self.done[row] = last
            starts.append(starts[-1] + last - first)
            for position in range(first, last):
                positions.append(position)
                table = self.tables[row]
                slots.append(table[position // self.block] * self.block + position % self.block)
        width = max(len(self.tables[row]) for row in rows)
        batch = StepBatch(
            num_tokens=len(slots),
            num_rows=len(rows),
            max_query_len=max(last - first for first, last in spans),
            max_seq_len=max(last for _, last in spans),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(
                [self.tables[r] + [-1] * (width - len(self.tables[r])) for r in rows],
                dtype=torch.int32,
            ),
            seq_lens=torch.tensor([last for _, last in spans], dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
        )

        def packed(tensors: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([tensors[r][a:b] for r, (a, b) in zip(rows, spans, strict=True)])

        found = self.kernels.attend(
            packed(self.q), packed(self.k), packed(self.v), self.pool, self.layer, batch
        )
        assert found.dtype == self.dtype
        assert found.is_contiguous()
        for number, (row, (first, last)) in enumerate(zip(rows, spans, strict=True)):
            part = found[starts[number] : starts[number + 1]].double()
            truth = oracle(
                self.q[row][first:last], self.k[row][:last], self.v[row][:last], self.layer
            )
            plain = oracle(
                self.q[row][first:last], self.k[row][:last], self.v[row][:last], self.layer,
                torch.float32,
            ).to(self.dtype)  # fmt: skip
            honest = (plain.double() - truth).abs().max().item()
            limit = 3 * honest + (2e-6 if self.dtype == torch.float32 else 1e-2)
            error = (part - truth).abs().max().item()
            assert error <= limit, f"row {row}: error {error:.2e}, limit {limit:.2e}"


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:  # fmt: skip
    """Dense attention in `dtype`, written apart from every kernel."""
    group = layer.num_heads // layer.num_kv_heads
    out = torch.empty(q.shape, dtype=dtype)
    offset = k.shape[0] - q.shape[0]
    for head in range(layer.num_heads):
        keys, values = k[:, head // group].to(dtype), v[:, head // group].to(dtype)
        scores = q[:, head].to(dtype) @ keys.T * layer.scale
        if layer.softcap:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        position = offset + torch.arange(len(scores))[:, None]
        key = torch.arange(k.shape[0])[None, :]
        scores[key > position] = -torch.inf
        if layer.window:
            scores[key <= position - layer.window] = -torch.inf
        if layer.sinks is not None:
            extra = layer.sinks[head].to(dtype).expand(len(scores), 1)
            weights = torch.softmax(torch.cat([scores, extra], dim=1), dim=1)[:, :-1]
        else:
            weights = torch.softmax(scores, dim=1)
        out[:, head] = weights @ values
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (5, 1), (12, 4)])
def test_packed_prefill_then_decode(
    kernels: Any, dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    case = Case(kernels, [n + 2 for n in LENGTHS], heads=heads, kv_heads=kv_heads, dtype=dtype)
    case.step(LENGTHS)
    case.step([1] * len(LENGTHS))
    case.step([1] * len(LENGTHS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "features",
    [
        {"window": 5},
        {"window": 16},
        {"softcap": 3.0},
        {"sinks": True},
        {"window": 20, "softcap": 2.0, "sinks": True},
    ],
    ids=str,
)
def test_features(kernels: Any, dtype: torch.dtype, features: dict[str, Any]) -> None:
    case = Case(kernels, [n + 1 for n in LENGTHS], dtype=dtype, **features)
    case.step(LENGTHS)
    case.step([1] * len(LENGTHS))


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(kernels: Any, dim: int, dtype: torch.dtype) -> None:
    case = Case(kernels, [40, 18], dim=dim, dtype=dtype)
    case.step([39, 17])
    case.step([1, 1])


@pytest.mark.parametrize("block", [16, 32, 64])
def test_block_sizes(kernels: Any, block: int) -> None:
    case = Case(kernels, [70, 33, 5], block=block)
    case.step([40, 33, 1])
    case.step([30, 0, 4])


def test_chunks_and_mixed_rows(kernels: Any) -> None:
    case = Case(kernels, [97, 50, 20], heads=6)
    for counts in ([15, 1, 0], [17, 1, 5], [33, 48, 1], [32, 0, 14]):
        case.step(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [{}, {"window": 100}, {"sinks": True}], ids=str)
def test_long_context_is_cut_and_merged(kernels: Any, dtype: torch.dtype, features: Any) -> None:
    if kernels.name == "reference" and features:
        pytest.skip("the reference has no other path for long rows")
    case = Case(kernels, [2090, 1030], dtype=dtype, heads=4, kv_heads=1, **features)
    case.step([2080, 1024])
    case.step([3, 1])
    case.step([1, 1])


def test_what_a_row_computes_does_not_depend_on_the_others(kernels: Any) -> None:
    together = Case(kernels, [50, 1100, 30], seed=3)
    together.step([50, 1100, 30])
    alone = Case(kernels, [50, 1100, 30], seed=3)
    outputs = []
    original = kernels.attend
    for case, plan in ((together, None), (alone, None)):
        del plan
        results = []

        def attend(*args: Any, results: list[torch.Tensor] = results) -> torch.Tensor:
            results.append(original(*args))
            return results[-1]

        kernels.attend = attend
        if case is together:
            case.done = [49, 1099, 29]
            case.step([1, 1, 1])
        else:
            case.step([49, 1099, 29])
            results.clear()
            case.step([1, 0, 0])
            case.step([0, 1, 0])
            case.step([0, 0, 1])
        outputs.append(torch.cat(results))
        del kernels.attend
    assert torch.equal(outputs[0], outputs[1])


def test_a_token_without_slot_is_not_written(kernels: Any) -> None:
    case = Case(kernels, [16])
    before = case.pool.data.clone()
    batch = StepBatch(
        1, 1, 1, 1, torch.tensor([0]), torch.tensor([-1]), torch.tensor([[0]], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32),
    )  # fmt: skip
    kernels.attend(case.q[0][:1], case.k[0][:1], case.v[0][:1], case.pool, case.layer, batch)
    assert torch.equal(before.isnan(), case.pool.data.isnan())


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_blocks_read_back_what_was_written(kernels: Any, name: Any) -> None:
    spec = KVSpec(3, 2, 32, name, 16)
    pool = DEVICE.allocate_kv(kernels.layout(spec), 7, host=False)
    data = torch.randn(2, 3, 4, 16, 2, 32).to(pool.data.dtype)
    kernels.write_blocks(pool, [5, 0, 3, 2], data)
    assert torch.equal(kernels.read_blocks(pool, [5, 0, 3, 2]), data)
    assert torch.equal(kernels.read_blocks(pool, [3]), data[:, :, 2:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_canonical_blocks_hold_the_keys_and_values(kernels: Any, dtype: torch.dtype) -> None:
    case = Case(kernels, [20], dtype=dtype)
    case.step([20])
    blocks = kernels.read_blocks(case.pool, case.tables[0])[:, case.layer.index]
    flat = blocks.reshape(2, 32, 2, 32)[:, :20]
    assert torch.equal(flat[0], case.k[0])
    assert torch.equal(flat[1], case.v[0])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_moves_are_exact(kernels: Any, name: Any) -> None:
    spec = KVSpec(2, 2, 32, name, 16)
    pool = DEVICE.allocate_kv(kernels.layout(spec), 6, host=False)
    host = DEVICE.allocate_kv(kernels.layout(spec), 4, host=True)
    pool.data.copy_(torch.randn(pool.data.shape))
    original = pool.data.clone()
    kernels.swap_out(pool, host, [BlockMove(1, 3), BlockMove(4, 0)])
    pool.data[:, [1, 4]] = float("nan")
    kernels.swap_in(pool, host, [BlockMove(3, 5), BlockMove(0, 1)])
    kernels.copy_blocks(pool, [BlockMove(0, 2), BlockMove(5, 4)])
    expected = original[:, [0, 4, 0, 3, 1, 1]]
    assert torch.equal(pool.data, expected)


def test_strided_inputs(kernels: Any) -> None:
    """q, k and v may be slices of one fused projection."""
    case = Case(kernels, [24], heads=4, kv_heads=2, dim=32)
    fused = torch.cat([x[0].flatten(1) for x in (case.q, case.k, case.v)], dim=1)
    case.q = [fused[:, :128].view(24, 4, 32)]
    case.k = [fused[:, 128:192].view(24, 2, 32)]
    case.v = [fused[:, 192:].view(24, 2, 32)]
    case.step([24])


def test_the_oracle_sees_wrong_kernels(kernels: Any) -> None:
    """A wrong scale, window, head group or slot must fail, or the tests above prove nothing."""
    wrong = [{"scale": 0.2}, {"window": 40}, {"softcap": 5.0}]
    for change in wrong:
        case = Case(kernels, [60])
        right = case.layer
        original = kernels.attend

        def attend(q: Any, k: Any, v: Any, pool: Any, layer: Any, batch: Any,
                   original: Any = original, change: Any = change) -> Any:  # fmt: skip
            return original(q, k, v, pool, replace(layer, **change), batch)

        kernels.attend = attend
        case.layer = right
        with pytest.raises(AssertionError, match="error"):
            case.step([60])
        del kernels.attend


def test_every_isa_of_this_machine_is_tested() -> None:
    assert set(KERNELS) == {"reference", *(f"native-{isa}" for isa in ISAS)}
    assert list(itertools.chain(ISAS))[-1] == "portable"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_first_largest_number_of_each_row(isa: str, dtype: torch.dtype) -> None:
    """Ties, NaN, rows of -inf, odd lengths, rows that lie apart."""
    found = NativeKernels(DEVICE, isa)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 31, 32, 33, 100, 1027, 32000):
        wide = torch.randint(-9, 9, (12, count + 5), generator=generator).to(dtype)
        wide[1] = -float("inf")
        wide[2, count // 2] = float("nan")
        wide[3, count - 1] = 99
        wide[4, count - 1], wide[4, 0] = float("inf"), float("inf")
        wide[5] = -float("inf")
        wide[5, count // 3] = -3
        logits = wide[:, :count]
        where, values = found.largest(logits)
        wanted = torch.from_numpy(logits.float().numpy().argmax(axis=-1))
        assert torch.equal(where, wanted), count
        chosen = logits.float().gather(1, wanted[:, None])[:, 0]
        assert torch.equal(values.nan_to_num(7e5), chosen.nan_to_num(7e5))


def test_native_moves_refuse_pools_that_they_would_misread() -> None:
    device, kernels = CpuDevice(), NativeKernels(CpuDevice())
    layout = kernels.layout(KVSpec(2, 2, 32, "float32", 16))
    pool = device.allocate_kv(layout, 4, host=False)
    whole = torch.zeros(4, 2, *layout.block_shape)
    host = KVPool(layout, 4, True, whole.transpose(0, 1))  # blocks outermost
    with pytest.raises(AssertionError, match="contiguous"):
        kernels.swap_out(pool, host, [BlockMove(0, 1)])
