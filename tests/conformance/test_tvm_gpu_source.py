"""The CUDA source of the TVM kernels, run without a GPU: threads become fibers that meet at barriers.

It shows that the algorithm, its indices and its barriers are right; not that a GPU runs it fast,
nor what its compiler makes of it.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels_contract import DEVICE, Case

from halyard.hal.kernels.native.library import find_compiler
from halyard.hal.kernels.tvm.emit import KERNELS, emit_source
from halyard.hal.kernels.tvm.kernels import TvmKernels
from halyard.hal.kernels.tvm.shape import SPLIT, KernelShape, MoveShape, num_parts
from halyard.hal.types import BlockMove, KVSpec

pytest.importorskip("tvm", reason='needs pip install "halyard[tvm]"')
if find_compiler() is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)

THREADS = 128
SHAPE = KernelShape(2, 2, 32, 16, "float32")
PRELUDE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ucontext.h>
#include <vector>
using std::min; using std::max;
struct dim { int x, y, z; };
struct float4 { float x, y, z, w; };
static dim threadIdx, blockIdx;
static ucontext_t home, fibers[THREADS];
static std::vector<char> stacks(THREADS * 65536);
static bool done[THREADS];
static int here;
#define __global__
#define __launch_bounds__(n)
#define __restrict__
static void __syncthreads() { int me = here; swapcontext(&fibers[me], &home); threadIdx.x = me; }
template <class F> static void run_block(F body) {
    static F* current; current = &body;
    void (*entry)() = [] { threadIdx.x = here; (*current)(); done[here] = true; };
    for (int t = 0; t < THREADS; ++t) {
        getcontext(&fibers[t]); done[t] = false;
        fibers[t].uc_stack.ss_sp = &stacks[t * 65536]; fibers[t].uc_stack.ss_size = 65536;
        fibers[t].uc_link = &home;
        makecontext(&fibers[t], entry, 0);
    }
    for (bool any = true; any;) {  // backwards, so that a missing barrier shows
        any = false;
        for (int t = THREADS - 1; t >= 0; --t)
            if (!done[t]) { here = t; threadIdx.x = t; swapcontext(&home, &fibers[t]); any = true; }
    }
}
"""


class Emulated:
    """One generated kernel as a function with the arguments of TVM's."""

    def __init__(self, library: ctypes.CDLL, source: str, name: str, order: list[str]) -> None:
        found = re.search(rf"{name}_kernel\((.*?)\) {{", source)
        assert found is not None
        self.parameters = [part.split()[-1] for part in found[1].split(",")]
        self.order, self.call = order, getattr(library, f"run_{name}")
        self.name = name

    def __call__(self, *arguments: Any) -> None:
        given = dict(zip(self.order, arguments, strict=True))
        values: dict[str, Any] = {}
        for key, value in given.items():
            if isinstance(value, torch.Tensor):
                values[f"{key}_ptr"] = ctypes.c_void_p(value.data_ptr())
                for dim in range(value.dim()):
                    values[f"{key}{dim}"] = value.stride(dim)
            else:
                values[key] = ctypes.c_float(value) if key in ("scale", "cap") else value
        if "tables" in given:
            values |= {
                "table_stride": given["tables"].stride(0),
                "rows": given["tables"].shape[0],
                "max_blocks": given["tables"].shape[1],
            }
        if "pool" in given:
            values |= {"blocks": given["pool"].shape[1], "layers": given["pool"].shape[0]}
        if "partial" in given:
            values |= {"split_rows": len(given["partial"]), "parts": given["partial"].shape[1]}
        if "pairs" in given:
            values |= {"layers": len(given["source"]), "moves": len(given["pairs"])}
            values |= {f"{x}_blocks": given[x].shape[1] for x in ("source", "target")}
        # TVM takes the offset into the tensor apart from its address; ours is in the address.
        taken = [values.get(name, 0) for name in self.parameters]
        if self.name == "write":
            grid = (len(given["k"]), 1)
        elif self.name == "move":
            grid = (len(given["pairs"]), len(given["source"]))
        elif self.name == "merge":
            grid = (len(given["lens"]), given["partial"].shape[2])
        else:
            heads, parts = given["pool"].shape[3], given["partial"].shape[1]
            grid = (len(given["lens"]), given["tiles"] * heads * parts)
        self.call(*grid, *taken)


@cache
def generated(shape: KernelShape) -> str:
    """The CUDA source, which takes seconds; several tests have the same."""
    made = emit_source("cuda", shape.dtype, shape=shape)
    assert made.status == "generated", made.reason
    return made.source[made.source.index('extern "C"') :]


@cache
def compiled(folder: Path, shape: KernelShape, barriers: bool) -> tuple[ctypes.CDLL, str]:
    """As a library, and its source."""
    source = generated(shape).replace("__shared__ alignas(64)", "alignas(64) static")
    if not barriers:
        source = source.replace("__syncthreads();", "")
    runs = ""
    for name in KERNELS:
        found = re.search(rf'extern "C".*? {name}_kernel\((.*?)\) {{', source)
        assert found is not None
        names = ", ".join(part.split()[-1] for part in found[1].split(","))
        runs += (
            f'extern "C" void run_{name}(int gx, int gy, {found[1]}) {{\n'
            "  for (blockIdx.y = 0; blockIdx.y < gy; ++blockIdx.y)\n"
            "    for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x)\n"
            f"      run_block([&] {{ {name}_kernel({names}); }});\n}}\n"
        )
    text = folder / f"{shape.name}-{barriers}.cpp"
    text.write_text(PRELUDE.replace("THREADS", str(THREADS)) + source + runs)
    binary = text.with_suffix(".so")
    compiler = find_compiler()
    assert compiler is not None
    command = [
        compiler,
        "-O1",
        "-w",
        "-std=c++17",
        "-fPIC",
        "-shared",
        str(text),
        "-o",
        str(binary),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[:2000]
    return ctypes.CDLL(str(binary)), source


def emulate(
    folder: Path, shape: KernelShape | MoveShape, barriers: bool = True, model: KernelShape = SHAPE
) -> dict[str, Any]:
    """The functions for `shape`; moves come with a model's."""
    if isinstance(shape, MoveShape):
        shape = model
    library, source = compiled(folder, shape, barriers)
    attend = ["q", "pool", "out", "tables", "lens", "start", "sink", "layer", "window", "scale",
              "cap", "tiles", "partial", "stats"]  # fmt: skip
    orders = dict.fromkeys(KERNELS, attend) | {
        "write": ["k", "v", "pool", "slots", "layer"],
        "merge": ["partial", "stats", "out", "lens", "start", "sink"],
        "move": ["source", "target", "pairs"],
    }
    return {name: Emulated(library, source, name, order) for name, order in orders.items()}


def emulated(folder: Path, **options: Any) -> TvmKernels:
    """The kernels as they run on a GPU, with emulated functions."""
    kernels = TvmKernels(DEVICE)
    kernels._on_cpu = False
    kernels._compile = lambda shape: emulate(folder, shape, **options)  # type: ignore[method-assign]
    return kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def fill(run: Case, row: int, length: int) -> None:
    """Put the first tokens of a row in its blocks without computing them."""
    spec, table = run.pool.layout.spec, run.tables[row]
    data = torch.full(
        (2, spec.num_layers, len(table) * spec.block_size, spec.num_kv_heads, spec.head_dim),
        float("nan"),
    )
    data[:, run.layer.index, :length] = torch.stack([run.k[row][:length], run.v[row][:length]])
    shape = (2, spec.num_layers, len(table), spec.block_size, *data.shape[3:])
    run.kernels.write_blocks(run.pool, table, data.view(shape))
    run.done[row] = length


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "features"),
    [
        (4, 2, 32, {}),
        (12, 1, 80, {"window": 20, "softcap": 2.0, "sinks": True}),
        (3, 3, 256, {"window": 150}),
    ],
    ids=str,
)
def test_against_the_oracle(
    heads: int, kv_heads: int, dim: int, features: dict[str, Any], folder: Path
) -> None:
    kernels = emulated(folder)
    lengths = [1, 15, 16, 17, 97, 300]
    run = Case(
        kernels, [n + 2 for n in lengths], heads=heads, kv_heads=kv_heads, dim=dim, **features
    )
    run.step(lengths)
    run.step([1] * len(lengths))
    run.step([0, 0, 1, 1, 0, 1])
    blocks = kernels.read_blocks(run.pool, run.tables[4])[:, run.layer.index]
    flat = blocks.reshape(2, -1, kv_heads, dim)[:, :98]
    assert torch.equal(flat[0], run.k[4][:98])
    assert torch.equal(flat[1], run.v[4][:98])


def test_a_missing_barrier_shows(folder: Path) -> None:
    kernels = emulated(folder, barriers=False)
    with pytest.raises(AssertionError, match="error"):
        Case(kernels, [40], heads=4, kv_heads=2, dim=32).step([40])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "features"),
    [(4, 2, 32, {}), (3, 1, 80, {"window": 600, "softcap": 2.0, "sinks": True})],
    ids=str,
)
def test_long_rows_are_cut_and_merged(
    heads: int, kv_heads: int, dim: int, features: dict[str, Any], folder: Path
) -> None:
    kernels = emulated(folder)
    lengths = [SPLIT, SPLIT + 1, 17, 2 * SPLIT, 1500]
    run = Case(
        kernels, [n + 3 for n in lengths], heads=heads, kv_heads=kv_heads, dim=dim, **features
    )
    for row, length in enumerate(lengths):
        fill(run, row, length)
    assert num_parts(max(lengths) + 1) > 1
    run.step([1] * len(lengths))
    run.step([1, 2, 1, 0, 1])  # a chunk beside them


def test_cutting_other_rows_changes_nothing(folder: Path) -> None:
    """A short row is done whole alone, and as one part beside a long one: bit for bit the same."""
    kernels = emulated(folder)
    outputs = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(kernels, name)

        def attend(self, *args: Any) -> torch.Tensor:
            outputs.append(kernels.attend(*args))
            return outputs[-1]

    run = Case(Spy(), [400, 1100, 9000], heads=2, kv_heads=2, dim=32)
    for row, length in enumerate((399, 1099, 8999)):
        fill(run, row, length)
    run.step([1, 1, 1])
    for row in range(3):
        run.done = [399, 1099, 8999]
        run.step([int(row == n) for n in range(3)])
    assert torch.equal(outputs[0], torch.cat(outputs[1:]))


def test_moves(folder: Path) -> None:
    kernels = emulated(folder, model=SHAPE)
    spec = KVSpec(3, SHAPE.num_kv_heads, SHAPE.head_dim, "float32", SHAPE.block_size)
    pool = DEVICE.allocate_kv(kernels.layout(spec), 6, host=False)
    pool.data.normal_()
    original = pool.data.clone()
    kernels.copy_blocks(pool, [BlockMove(0, 2), BlockMove(5, 4)])
    assert torch.equal(pool.data, original[:, [0, 1, 0, 3, 5, 5]])
