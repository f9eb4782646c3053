"""Checks of the Triton kernels that hold on any device: the interpreter's CPU and a real GPU.

Not collected by itself: test_triton_interpreter.py and tests/device/test_cuda_kernels.py run these.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from halyard.hal.conformance.case import CaseContext
from halyard.hal.conformance.sequences import Sequences
from halyard.hal.kernels.triton.kernels import TritonKernels
from halyard.hal.types import BlockMove, DType, KVSpec

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
