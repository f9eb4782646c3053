"""A feed-forward layer's first product on Hopper, its gate in the same kernel: many rows, 16 bits.

The library writes both halves of the product to memory, and a second kernel reads them, activates the
first, multiplies and writes again. Here both halves of a tile end in the same threads' registers.

One program a multiprocessor takes tile after tile. One warp of it copies (tensor copies, which take a
box of a matrix each), two warpgroups multiply; they meet at barriers in shared memory: a stage is
`full` when its copies are there, `empty` when the products that read it are done.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["gated_product_kernel"]


@gluon.jit
def _place(tile: gl.tensor, num_m: gl.tensor, num_n: gl.tensor, GROUP_M: gl.constexpr) -> gl.tensor:
    """Which rows and columns: tiles that run at once share much of what they read."""
    group = tile // (GROUP_M * num_n)
    size = gl.minimum(num_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * num_n)
    return group * GROUP_M + within % size, within // size


@gluon.jit
def _copy_tiles(
    x: gl.tensor, w: gl.tensor, a: gl.shared_memory_descriptor, b: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor, empty: gl.shared_memory_descriptor,
    num_m: gl.tensor, num_n: gl.tensor, inputs: gl.tensor, outputs: gl.tensor,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
) -> None:  # fmt: skip
    """The copying warp: rows of x, and the two halves' rows of w, one stage after the other."""
    stage = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _place(tile, num_m, num_n, GROUP_M)
        for k in range(0, inputs, BLOCK_K):
            slot = stage % STAGES
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), (stage // STAGES & 1) ^ 1)  # at first it is
            mbarrier.expect(ready, (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * 2)
            first = b.index(slot).slice(0, BLOCK_N)
            second = b.index(slot).slice(BLOCK_N, BLOCK_N)
            tma.async_copy_global_to_shared(x, [m * BLOCK_M, k], ready, a.index(slot))
            tma.async_copy_global_to_shared(w, [n * BLOCK_N, k], ready, first)
            tma.async_copy_global_to_shared(w, [outputs + n * BLOCK_N, k], ready, second)
            stage += 1


@gluon.jit
def _multiply_tiles(
    out: gl.tensor, a: gl.shared_memory_descriptor, b: gl.shared_memory_descriptor,
    staged: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, num_m: gl.tensor, num_n: gl.tensor, inputs: gl.tensor,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, GELU: gl.constexpr,
) -> None:  # fmt: skip
    """The multiplying warps. A product is under way while the one before it is let go."""
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 2 * BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    stage = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        acc = gl.zeros([BLOCK_M, 2 * BLOCK_N], gl.float32, ACC)
        for k in range(0, inputs, BLOCK_K):
            slot = stage % STAGES
            mbarrier.wait(full.index(slot), stage // STAGES & 1)
            weights = b.index(slot).permute((1, 0))
            acc = warpgroup_mma(a.index(slot), weights, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=k > 0)
            stage += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
        gate, up = gl.split(gl.permute(gl.reshape(acc, [BLOCK_M, 2, BLOCK_N]), (0, 2, 1)))
        slope = gate
        if GELU:  # by tanh: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
            slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
        result = gate / (1.0 + gl.exp2(slope * -1.4426950408889634)) * up
        tma.store_wait(0)  # of the tile before
        staged.store(gl.convert_layout(result.to(out.dtype), HALF, assert_trivial=True))
        fence_async_shared()
        m, n = _place(tile, num_m, num_n, GROUP_M)
        tma.async_copy_shared_to_global(out, [m * BLOCK_M, n * BLOCK_N], staged)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows"])
def gated_product_kernel(
    x: gl.tensor, w: gl.tensor, out: gl.tensor, rows: gl.tensor, inputs: gl.tensor,
    outputs: gl.tensor,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, GELU: gl.constexpr,
) -> None:  # fmt: skip
    """out [rows, outputs] = act(x w1^T) * (x w2^T), sums in fp32, rounded once.

    x [rows, inputs] and w [2 x outputs, inputs], w1 above w2: tensor descriptors with boxes of
    BLOCK_M or BLOCK_N by BLOCK_K; out's is BLOCK_M by BLOCK_N. outputs is a multiple of BLOCK_N; what
    of a box is outside its matrix is read as zero and not written. Any number of programs.

    Args:
        GROUP_M: tiles of rows that are taken together. GELU: by tanh; else silu.
    """
    num_m = (rows + BLOCK_M - 1) // BLOCK_M
    num_n = outputs // BLOCK_N
    a = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    b = gl.allocate_shared_memory(x.dtype, [STAGES, 2 * BLOCK_N, BLOCK_K], w.layout)
    staged = gl.allocate_shared_memory(x.dtype, [BLOCK_M, BLOCK_N], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply_tiles, (out, a, b, staged, full, empty, num_m, num_n, inputs,
                               BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M, GELU)),
            (_copy_tiles, (x, w, a, b, full, empty, num_m, num_n, inputs, outputs,
                           BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M)),
        ],
        [1],
        [24],
    )  # fmt: skip
