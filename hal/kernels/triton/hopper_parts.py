"""What Hopper's kernels have in common whose warpgroups share keys: one warp copies, the others multiply.

A tile of keys or values is copied by tensor copies, a box of 16 slots of a block each. The copying warp
and the warpgroups meet at barriers in shared memory: a tile is `full` when its copies are there, `empty`
when every warpgroup is done with it.
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

from halyard.hal.kernels.triton.hopper_online import out_layout, score_layout, soften

__all__ = ["attend_keys", "begin_barriers", "copy_keys", "leave_keys"]

if not hasattr(gl.shared_memory_descriptor, "_reinterpret"):  # no public name of Triton's
    raise ImportError("this Triton's Gluon doesn't see shared memory in another shape")


@gluon.jit
def _blocks_of(
    table: gl.tensor, tile: gl.tensor, end: gl.tensor,
    BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """The block of each 16 keys of a tile; past the end it is any."""
    blocks: gl.tuple = ()
    for part in gl.static_range(BLOCK_N // 16):
        key = tile * BLOCK_N + part * 16
        blocks += (gl.load(table + key // BLOCK_SIZE, mask=key < end, other=0),)
    return blocks


@gluon.jit
def _copy_tile(
    boxes: gl.tensor, target: gl.shared_memory_descriptor, ready: gl.shared_memory_descriptor,
    blocks: gl.tuple, tile: gl.tensor, head: gl.tensor,
    BLOCK_SIZE: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy a tile: 64 columns of all its keys lie together, as a product reads them."""
    mbarrier.expect(ready, BLOCK_N * HEAD_DIM * 2)
    for part in gl.static_range(BLOCK_N // 16):
        row = (blocks[part] * HEADS + head) * BLOCK_SIZE + (tile * BLOCK_N + part * 16) % BLOCK_SIZE
        for half in gl.static_range(HEAD_DIM // 64):
            piece = target.slice(half * BLOCK_N + part * 16, 16)
            tma.async_copy_global_to_shared(boxes, [row, half * 64], ready, piece)


@gluon.jit
def copy_keys(
    boxes: gl.tensor, table: gl.tensor, k: gl.shared_memory_descriptor, v: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    tiles: gl.tensor, end: gl.tensor, kv_head: gl.tensor,
    BLOCK_SIZE: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """The copying warp. The next tile's blocks are read while this one waits for its place."""
    blocks = _blocks_of(table, 0, end, BLOCK_SIZE, BLOCK_N)
    for tile in range(tiles):
        coming = _blocks_of(table, tile + 1, end, BLOCK_SIZE, BLOCK_N)
        slot = tile % STAGES
        turn = (tile // STAGES & 1) ^ 1  # at first it is empty
        mbarrier.wait(k_empty.index(slot), turn)
        _copy_tile(
            boxes, k.index(slot), k_full.index(slot), blocks, tile, kv_head,
            BLOCK_SIZE, 2 * KV_HEADS, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        mbarrier.wait(v_empty.index(slot), turn)
        _copy_tile(
            boxes, v.index(slot), v_full.index(slot), blocks, tile, KV_HEADS + kv_head,
            BLOCK_SIZE, 2 * KV_HEADS, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        blocks = coming


@gluon.jit
def _as_matrix(
    tile: gl.shared_memory_descriptor, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr
) -> gl.shared_memory_descriptor:
    """A tile as the [BLOCK_N, HEAD_DIM] that its 64 columns beside 64 columns are in shared memory."""
    return tile._reinterpret(tile.dtype, [BLOCK_N, HEAD_DIM], tile.layout)


@gluon.jit
def _fold_tile(
    q: gl.shared_memory_descriptor, k: gl.shared_memory_descriptor, v: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    acc: gl.tensor, total: gl.tensor, peak: gl.tensor, weight: gl.tensor, tile: gl.tensor,
    position: gl.tensor, column: gl.tensor, qk_scale: gl.tensor,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, SCORE: gl.constexpr, OUT: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """As hopper_online's: fold a tile into acc and make the weights of the next one meanwhile."""
    slot = tile % STAGES
    following = (tile + 1) % STAGES
    mbarrier.wait(v_full.index(slot), tile // STAGES & 1)
    mbarrier.wait(k_full.index(following), (tile + 1) // STAGES & 1)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORE)
    keys = _as_matrix(k.index(following), BLOCK_N, HEAD_DIM).permute((1, 0))
    coming = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    values = _as_matrix(v.index(slot), BLOCK_N, HEAD_DIM)
    sums = warpgroup_mma(weight, values, acc, is_async=True)
    score = warpgroup_mma_wait(1, deps=[coming])
    mbarrier.arrive(k_empty.index(following))
    # The turn before ended with its product. To tell it there has ptxas put the softmax behind the wait.
    mbarrier.arrive(v_empty.index((tile + STAGES - 1) % STAGES), pred=tile > 0)
    weight, shrink, total, peak = soften(
        score, total, peak, tile + 1, position, column, qk_scale, BLOCK_M, BLOCK_N, MASKED,
        q.dtype, SCORE, OUT,
    )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[sums]) * shrink[:, None]
    return acc, total, peak, weight


@gluon.jit
def begin_barriers(
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    clean: gl.shared_memory_descriptor, PARTS: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """Before the warps part. `clean` is for what lies past the end: the first part makes it zero."""
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=PARTS)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=PARTS)
    mbarrier.init(clean.index(0), count=1)
    fence_async_shared()


@gluon.jit
def leave_keys(
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    tiles: gl.tensor, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """A warpgroup without queries: the others' tiles make room for what follows."""
    for tile in range(tiles - 1):
        mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1)
        mbarrier.arrive(k_empty.index(tile % STAGES))
        mbarrier.wait(v_full.index(tile % STAGES), tile // STAGES & 1)
        mbarrier.arrive(v_empty.index(tile % STAGES))


@gluon.jit
def attend_keys(
    q: gl.shared_memory_descriptor, k: gl.shared_memory_descriptor, v: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    clean: gl.shared_memory_descriptor, tiles: gl.tensor, end: gl.tensor, position: gl.tensor,
    least: gl.tensor, qk_scale: gl.tensor,
    PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """(sums [BLOCK_M, HEAD_DIM] in out_layout, total and peak [BLOCK_M] in score_layout's rows, fp32) of
    the keys 0 .. end - 1, which are `tiles` tiles; end is at least 1.

    q [BLOCK_M, HEAD_DIM]; position [BLOCK_M] in score_layout's rows: the last key that a query sees, of
    all at least `least`.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SCORE: gl.constexpr = score_layout(BLOCK_N, WARPS)
    OUT: gl.constexpr = out_layout(HEAD_DIM, WARPS)
    PIECE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    COUNT: gl.constexpr = HEAD_DIM // 64 * BLOCK_N
    last = tiles - 1
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORE))
    total = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, SCORE))
    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORE))
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, OUT)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORE)
    mbarrier.wait(k_full.index(0), 0)
    keys = _as_matrix(k.index(0), BLOCK_N, HEAD_DIM).permute((1, 0))
    score = warpgroup_mma(q, keys, zeros, use_acc=False)
    mbarrier.arrive(k_empty.index(0))
    weight, _, total, peak = soften(
        score,
        total,
        peak,
        0,
        position,
        column,
        qk_scale,
        BLOCK_M,
        BLOCK_N,
        True,
        q.dtype,
        SCORE,
        OUT,
    )
    seen = gl.maximum((least + 1) // BLOCK_N - 1, 0)
    seen = gl.minimum(seen, last)
    for tile in range(seen):
        acc, total, peak, weight = _fold_tile(
            q, k, v, k_full, k_empty, v_full, v_empty, acc, total, peak, weight, tile,
            position, column, qk_scale, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, False, SCORE, OUT,
        )  # fmt: skip
    for tile in range(seen, last):
        acc, total, peak, weight = _fold_tile(
            q, k, v, k_full, k_empty, v_full, v_empty, acc, total, peak, weight, tile,
            position, column, qk_scale, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, True, SCORE, OUT,
        )  # fmt: skip
    values = v.index(last % STAGES)
    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    if end < tiles * BLOCK_N:
        # What lies past the end may be anything, and nothing times anything may be NaN.
        if PART == 0:
            key = last * BLOCK_N + gl.arange(0, COUNT, gl.SliceLayout(1, PIECE)) % BLOCK_N
            found = values.load(PIECE)
            values.store(gl.where(key[:, None] < end, found, gl.zeros_like(found)))
            fence_async_shared()
            mbarrier.arrive(clean.index(0))
        mbarrier.wait(clean.index(0), 0)
    acc = warpgroup_mma(weight, _as_matrix(values, BLOCK_N, HEAD_DIM), acc)
    return acc, total, peak
