"""The Triton kernels' numerics on a machine without a GPU, in Triton's interpreter.

A process either compiles or interprets, so this file runs itself in a process of its own with
TRITON_INTERPRET=1. No bfloat16: the interpreter computes its dots on raw bits.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="runs in the process with TRITON_INTERPRET=1")
# float16 runs the same code with other roundings: a few shapes are enough.
CELLS = [
    *(("float32", name) for name in ("gqa", "mqa_5", "dim_24", "block_32", "window_5")),
    ("float32", "all_features"),
    ("float16", "all_features"),
]

if INTERPRETING:
    import triton_checks as checks
    import triton_expert_checks as expert_checks

    from halyard.hal.devices.cpu import CpuDevice
    from halyard.hal.kernels.triton.moves import index_moves
    from halyard.hal.kernels.triton.staging import runs_of
    from halyard.hal.types import BlockMove, KVPool, KVSpec


@pytest.mark.skipif(INTERPRETING, reason="this is the process it starts")
def test_in_a_process_that_interprets() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= len(CELLS) + 8


def made(dtype: str = "float32", **options: Any) -> Any:
    return checks.context(CpuDevice(), dtype, **options)  # type: ignore[arg-type]


@inside
@pytest.mark.parametrize(("dtype", "name"), CELLS)
def test_prefill_then_decode(dtype: str, name: str) -> None:
    checks.prefill_then_decode(made(dtype), **checks.SHAPES[name])


@inside
@pytest.mark.parametrize("name", ["all_features"])
def test_split_keys_are_merged(name: str) -> None:
    checks.prefill_then_decode(made(num_splits=3), **checks.SHAPES[name])


@inside
def test_a_group_wider_than_a_tile() -> None:
    sequences = checks.Sequences(made(), [19], heads=80, kv_heads=1, dim=16)
    sequences.step([18])
    sequences.step([1])


@inside
def test_mixed() -> None:
    checks.mixed(made())


@inside
@pytest.mark.parametrize("shape", ["gqa", "window_5"])
def test_rows_and_tokens_that_fill_up_a_step(shape: str) -> None:
    checks.filled_up(made(), **checks.SHAPES[shape])


@inside
@pytest.mark.parametrize("way", ["kernel", "index"])
def test_moves_to_a_host_pool_whose_blocks_are_outermost(way: str) -> None:
    device, kernels = CpuDevice(), made().kernels
    layout = kernels.layout(KVSpec(3, 2, 24, "float32", 16))
    pool = device.allocate_kv(layout, 9, host=False)
    whole = torch.zeros(6, 3, *layout.block_shape)
    host = KVPool(layout, 6, True, whole.transpose(0, 1))
    pool.data.copy_(torch.randn(pool.data.shape))
    original = pool.data.clone()
    out = [BlockMove(4, 0), BlockMove(1, 3), BlockMove(2, 4), BlockMove(8, 5)]
    back = [BlockMove(3, 0), BlockMove(5, 7)]
    if way == "kernel":
        kernels.swap_out(pool, host, out)
        kernels.swap_in(pool, host, back)
    else:
        index_moves(pool, host, out)
        index_moves(host, pool, back)
        index_moves(host, pool, [])
    assert torch.equal(host.data[:, [0, 3, 4, 5]], original[:, [4, 1, 2, 8]])
    assert not host.data[:, [1, 2]].any()
    assert torch.equal(pool.data, original[:, [1, 1, 2, 3, 4, 5, 6, 8, 8]])


@inside
def test_neighbouring_host_blocks_are_one_copy() -> None:
    runs = runs_of([0, 3, 4, 5, 9, 11, 12])
    assert runs == [(0, 0, 1), (1, 3, 3), (4, 9, 1), (5, 11, 2)]
    assert runs_of([7]) == [(0, 7, 1)]


@inside
def test_decode_rows_beside_a_long_chunk() -> None:
    checks.long_mixed(made(), heads=2, kv_heads=1, dim=32)


@inside
def test_moves() -> None:
    checks.moves(made())


@inside
def test_canonical_form() -> None:
    checks.canonical(made())


@inside
@pytest.mark.parametrize("shape", ["gqa", "gqa_3", "softcap", "sinks"])
def test_rows_that_share_blocks_read_them_together(shape: str) -> None:
    checks.shared_rows(checks.context(CpuDevice(), "float32"), **checks.SHAPES[shape])


@inside
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_draws(dtype: str) -> None:
    checks.draws(checks.context(CpuDevice(), dtype))  # type: ignore[arg-type]


@inside
@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0, 15.0])
def test_draws_of_long_rows(spread: float) -> None:
    checks.draws(made(), 5_001, spread)


@inside
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_changes(dtype: str) -> None:
    checks.changes(checks.context(CpuDevice(), dtype))  # type: ignore[arg-type]


@inside
def test_draws_of_rows_that_programs_share() -> None:
    checks.split_draws(made())


@inside
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_skinny_linears(dtype: str) -> None:
    checks.skinny_linears(made(dtype))


@inside
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gates(dtype: str) -> None:
    checks.gates(made(dtype))


@inside
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_experts(dtype: str) -> None:
    expert_checks.experts(made(dtype))


@inside
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_largest(dtype: str) -> None:
    expert_checks.largest(made(dtype))


@inside
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rotations(dtype: str) -> None:
    checks.rotations(made(dtype))


@inside
def test_a_token_without_slot_is_not_written() -> None:
    checks.no_slot(made())


@inside
@pytest.mark.parametrize("change", [{"scale": 0.2}, {"window": 40}, {"softcap": 5.0}], ids=str)
def test_the_checks_see_wrong_kernels(change: dict[str, float]) -> None:
    from dataclasses import replace

    from halyard.hal.conformance.case import NonconformanceError

    context = made()
    right = context.kernels.launcher.attend
    context.kernels.launcher.attend = lambda q, data, layer, batch: right(
        q, data, replace(layer, **change), batch
    )
    with pytest.raises(NonconformanceError, match="error"):
        checks.mixed(context)
