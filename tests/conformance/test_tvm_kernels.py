"""The TVM kernels against the fp64 oracle of test_kernels_contract, at every shape they claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels_contract import DEVICE, LENGTHS, Case

from halyard.hal.types import BlockMove, KVLayout, KVSpec, StepBatch

pytest.importorskip("tvm", reason='needs pip install "halyard[tvm]"')

from halyard.hal.kernels.tvm.kernels import TvmKernels

KERNELS = TvmKernels(DEVICE)


class Half:
    """The kernels with an fp16 pool: Case knows fp32 and bf16 only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(KERNELS, name)

    def layout(self, spec: KVSpec) -> KVLayout:
        return KERNELS.layout(replace(spec, dtype="float16"))


def case(lengths: list[int], dtype: torch.dtype = torch.float32, **facts: Any) -> Case:
    return Case(Half() if dtype == torch.float16 else KERNELS, lengths, dtype=dtype, **facts)


# Every shape and dtype is compiled anew, seconds each: few of them, each for a reason.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [
        (4, 2, torch.float32),
        (4, 2, torch.bfloat16),
        (4, 2, torch.float16),
        (2, 2, torch.float32),
        (5, 1, torch.float32),
        (12, 1, torch.bfloat16),
    ],
)
def test_packed_prefill_then_decode(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    run = case([n + 2 for n in LENGTHS], dtype, heads=heads, kv_heads=kv_heads)
    run.step(LENGTHS)
    run.step([1] * len(LENGTHS))
    run.step([1] * len(LENGTHS))


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"window": 5}, torch.float32),
        ({"window": 16}, torch.float16),
        ({"softcap": 3.0}, torch.float32),
        ({"softcap": 50.0}, torch.float32),
        ({"sinks": True}, torch.float32),
        ({"window": 20, "softcap": 2.0, "sinks": True}, torch.float32),
        ({"window": 20, "softcap": 2.0, "sinks": True}, torch.bfloat16),
    ],
    ids=str,
)
def test_features(features: dict[str, Any], dtype: torch.dtype) -> None:
    run = case([n + 1 for n in LENGTHS], dtype, **features)
    run.step(LENGTHS)
    run.step([1] * len(LENGTHS))


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(16, torch.float32), (80, torch.float32), (128, torch.bfloat16), (256, torch.float32)],
)
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    run = case([40, 18], dtype, dim=dim)
    run.step([39, 17])
    run.step([1, 1])


@pytest.mark.parametrize(("block", "dtype"), [(32, torch.float32), (64, torch.bfloat16)])
def test_block_sizes(block: int, dtype: torch.dtype) -> None:
    run = case([70, 33, 5], dtype, block=block)
    run.step([40, 33, 1])
    run.step([30, 0, 4])
    blocks = run.kernels.read_blocks(run.pool, run.tables[0])[:, run.layer.index]
    flat = blocks.reshape(2, -1, 2, 32)[:, :70]
    assert torch.equal(flat[0], run.k[0])
    assert torch.equal(flat[1], run.v[0])


def test_chunks_and_mixed_rows() -> None:
    run = case([97, 50, 20], heads=6)
    for counts in ([15, 1, 0], [17, 1, 5], [33, 48, 1], [32, 0, 14]):
        run.step(counts)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [({}, torch.float32), ({"window": 100}, torch.float32), ({"window": 300}, torch.bfloat16)],
)
def test_long_context_is_many_spans(features: dict[str, Any], dtype: torch.dtype) -> None:
    run = case([1030, 777], dtype, **features)
    run.step([1025, 768])
    run.step([3, 1])
    run.step([1, 1])


def test_what_a_row_computes_does_not_depend_on_the_others() -> None:
    outputs: list[torch.Tensor] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(KERNELS, name)

        def attend(self, *args: Any) -> torch.Tensor:
            outputs.append(KERNELS.attend(*args))
            return outputs[-1]

    run = Case(Spy(), [50, 300, 30], seed=3)
    run.step([49, 299, 29])
    outputs.clear()
    run.step([1, 1, 1])
    for row in range(3):
        run.done = [49, 299, 29]
        run.step([int(row == i) for i in range(3)])
    assert torch.equal(outputs[0], torch.cat(outputs[1:]))


def test_a_token_without_slot_is_not_written() -> None:
    run = case([16])
    batch = StepBatch(
        1, 1, 1, 1, torch.tensor([0]), torch.tensor([-1]), torch.tensor([[0]], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32),
    )  # fmt: skip
    KERNELS.attend(run.q[0][:1], run.k[0][:1], run.v[0][:1], run.pool, run.layer, batch)
    assert run.pool.data.isnan().all()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_blocks_and_moves_are_exact(name: Any) -> None:
    spec = KVSpec(3, 2, 32, name, 16)
    pool = DEVICE.allocate_kv(KERNELS.layout(spec), 6, host=False)
    host = DEVICE.allocate_kv(KERNELS.layout(spec), 4, host=True)
    data = torch.randn(2, 3, 6, 16, 2, 32).to(pool.data.dtype)
    KERNELS.write_blocks(pool, [5, 0, 3, 2, 1, 4], data)
    assert torch.equal(KERNELS.read_blocks(pool, [3, 1]), data[:, :, [2, 4]])
    original = pool.data.clone()
    KERNELS.swap_out(pool, host, [BlockMove(1, 3), BlockMove(4, 0)])
    pool.data[:, [1, 4]] = float("nan")
    KERNELS.swap_in(pool, host, [BlockMove(3, 5), BlockMove(0, 1)])
    KERNELS.copy_blocks(pool, [BlockMove(0, 2), BlockMove(5, 4)])
    assert torch.equal(pool.data, original[:, [0, 4, 0, 3, 1, 1]])


def test_strided_inputs() -> None:
    """q, k and v may be slices of one fused projection."""
    run = case([24], heads=4, kv_heads=2, dim=32)
    fused = torch.cat([x[0].flatten(1) for x in (run.q, run.k, run.v)], dim=1)
    run.q = [fused[:, :128].view(24, 4, 32)]
    run.k = [fused[:, 128:192].view(24, 2, 32)]
    run.v = [fused[:, 192:].view(24, 2, 32)]
    run.step([24])
    piece = case([24], heads=4, kv_heads=2, dim=32)
    packed = torch.cat([x[0].flatten(1) for x in (piece.q, piece.k, piece.v)], dim=1)
    batch = StepBatch(
        24, 1, 24, 24, torch.arange(24), torch.arange(24),
        torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([24], dtype=torch.int32),
        torch.tensor([0, 24], dtype=torch.int32),
    )  # fmt: skip
    views = packed[:, :128], packed[:, 128:192], packed[:, 192:]
    q, k, v = (x.view(24, -1, 32) for x in views)
    assert not q.is_contiguous()
    strided = KERNELS.attend(q, k, v, piece.pool, piece.layer, batch)
    plain = KERNELS.attend(*(x.contiguous() for x in (q, k, v)), piece.pool, piece.layer, batch)
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("change", [{"scale": 0.2}, {"window": 40}, {"softcap": 5.0}], ids=str)
def test_the_oracle_sees_wrong_kernels(change: dict[str, Any]) -> None:
    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(KERNELS, name)

        def attend(self, q: Any, k: Any, v: Any, pool: Any, layer: Any, batch: Any) -> Any:
            return KERNELS.attend(q, k, v, pool, replace(layer, **change), batch)

    run = Case(Wrong(), [60])
    with pytest.raises(AssertionError, match="error"):
        run.step([60])


def test_compiled_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALYARD_CACHE_DIR", str(tmp_path))
    facts: dict[str, Any] = {"heads": 3, "kv_heads": 3, "dim": 16}
    Case(TvmKernels(DEVICE), [5], **facts).step([5])
    (kept,) = (tmp_path / "tvm").glob("*.so")
    monkeypatch.setattr("tvm.compile", None)
    Case(TvmKernels(DEVICE), [5], **facts).step([5])
    monkeypatch.undo()
    monkeypatch.setenv("HALYARD_CACHE_DIR", str(tmp_path))
    whole = kept.read_bytes()
    kept.unlink()  # the first stays mapped
    kept.write_bytes(whole[: len(whole) // 2])
    Case(TvmKernels(DEVICE), [5], **facts).step([5])
    assert kept.stat().st_size > len(whole) // 2


def test_other_devices_are_told() -> None:
    metal = replace(DEVICE.info, kind="metal")
    assert TvmKernels.probe(metal).reasons == ("the tvm kernels run on cpu and cuda, not on metal",)
    cuda = TvmKernels.probe(replace(DEVICE.info, kind="cuda"))
    assert cuda.available == torch.cuda.is_available()
