"""Prefill for Hopper with long prompts: several warpgroups, each with queries of its own, read the same keys.

One warpgroup a program (hopper.py) waits for nobody, but each reads all keys from the second-level
cache for its 64 rows alone, and that is what it is bound by: 7 TB/s. Here one warp copies tiles of keys
and values (tensor copies, a box of 16 slots of a block each) for all warpgroups of a program. They
meet at barriers in shared memory: a tile is `full` when its copies are there, `empty` when every
warpgroup is done with it.
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
from triton.language.extra.cuda import gdc_launch_dependents

from halyard.hal.kernels.triton.hopper_online import (
    load_layout,
    out_layout,
    row_of_tile,
    score_layout,
    soften,
)

__all__ = ["hopper_wide_kernel"]

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
def _copy_keys(
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
def _attend(
    q: gl.tensor, out: gl.tensor, q_tiles: gl.shared_memory_descriptor,
    k: gl.shared_memory_descriptor, v: gl.shared_memory_descriptor,
    k_full: gl.shared_memory_descriptor, k_empty: gl.shared_memory_descriptor,
    v_full: gl.shared_memory_descriptor, v_empty: gl.shared_memory_descriptor,
    clean: gl.shared_memory_descriptor, tiles: gl.tensor, end: gl.tensor, first_token: gl.tensor,
    left: gl.tensor, first_position: gl.tensor, kv_head: gl.tensor, first_head: gl.tensor,
    qk_scale: gl.tensor, q_token: gl.tensor, q_head: gl.tensor,
    PART: gl.constexpr, GROUP: gl.constexpr, GROUP_TILE: gl.constexpr, KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """A warpgroup, the queries PART * TOKENS .. of the program's `left` ones, if there are any."""
    WARPS: gl.constexpr = gl.num_warps()
    TOKENS: gl.constexpr = BLOCK_M // GROUP_TILE
    LOAD: gl.constexpr = load_layout(BLOCK_N, HEAD_DIM, WARPS)
    SCORE: gl.constexpr = score_layout(BLOCK_N, WARPS)
    OUT: gl.constexpr = out_layout(HEAD_DIM, WARPS)
    PIECE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    DTYPE: gl.constexpr = q.dtype.element_ty
    COUNT: gl.constexpr = HEAD_DIM // 64 * BLOCK_N
    last = tiles - 1
    if left <= PART * TOKENS:
        for tile in range(last):  # the others' tiles make room for what follows
            mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1)
            mbarrier.arrive(k_empty.index(tile % STAGES))
            mbarrier.wait(v_full.index(tile % STAGES), tile // STAGES & 1)
            mbarrier.arrive(v_empty.index(tile % STAGES))
    else:
        member = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LOAD))
        query = PART * TOKENS + member // GROUP_TILE
        head = first_head + member % GROUP_TILE
        valid = (member < TOKENS * GROUP_TILE) & (query < left) & (head < GROUP)
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOAD))
        token = (first_token + query).to(gl.int64)
        place = q + (token * q_token + (kv_head * GROUP + head) * q_head)[:, None] + dim[None, :]
        own = q_tiles.index(PART)
        own.store(gl.load(place, mask=valid[:, None], other=0.0))
        fence_async_shared()
        position = gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORE)) // GROUP_TILE
        position = first_position + PART * TOKENS + position
        column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORE))
        total = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, SCORE))
        peak = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORE))
        acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, OUT)
        zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORE)
        mbarrier.wait(k_full.index(0), 0)
        keys = _as_matrix(k.index(0), BLOCK_N, HEAD_DIM).permute((1, 0))
        score = warpgroup_mma(own, keys, zeros, use_acc=False)
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
            DTYPE,
            SCORE,
            OUT,
        )
        seen = gl.maximum((first_position + PART * TOKENS + 1) // BLOCK_N - 1, 0)
        seen = gl.minimum(seen, last)
        for tile in range(seen):
            acc, total, peak, weight = _fold_tile(
                own, k, v, k_full, k_empty, v_full, v_empty, acc, total, peak, weight, tile,
                position, column, qk_scale, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, False, SCORE, OUT,
            )  # fmt: skip
        for tile in range(seen, last):
            acc, total, peak, weight = _fold_tile(
                own, k, v, k_full, k_empty, v_full, v_empty, acc, total, peak, weight, tile,
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
        result = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
        member = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
        query = PART * TOKENS + member // GROUP_TILE
        head = first_head + member % GROUP_TILE
        valid = (member < TOKENS * GROUP_TILE) & (query < left) & (head < GROUP)
        token = (first_token + query).to(gl.int64)
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, OUT))
        offset = token * (KV_HEADS * GROUP * HEAD_DIM) + (kv_head * GROUP + head) * HEAD_DIM
        gl.store(out + offset[:, None] + dim[None, :], result.to(DTYPE), mask=valid[:, None])


@gluon.jit(do_not_specialize=["table_row", "num_rows"])
def hopper_wide_kernel(
    q: gl.tensor, boxes: gl.tensor, out: gl.tensor, block_tables: gl.tensor, seq_lens: gl.tensor,
    query_start: gl.tensor, qk_scale: gl.tensor, num_rows: gl.tensor,
    q_token: gl.tensor, q_head: gl.tensor, table_row: gl.tensor,
    GROUP: gl.constexpr, GROUP_TILE: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr, REGISTERS: gl.constexpr, SKIP_SINGLE: gl.constexpr,
) -> None:  # fmt: skip
    """Arguments and grid as for paged_prefill_kernel, with tiles of PARTS * BLOCK_M // GROUP_TILE tokens.

    boxes: the pool of one layer as a matrix [blocks * 2 * KV_HEADS * BLOCK_SIZE, HEAD_DIM], a tensor
    descriptor with boxes of 16 x 64. Launched with 4 warps, the first part's.

    Args:
        BLOCK_M: rows of a part. PARTS: 2 or 3 warpgroups. REGISTERS: of a thread of each but the first.
        STAGES: tiles of keys, and of values, in shared memory, at least 2.
    """
    if SKIP_SINGLE:  # those rows' kernel may begin beside this one
        gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    GROUP_TILES: gl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    TOKENS: gl.constexpr = PARTS * (BLOCK_M // GROUP_TILE)
    COUNT: gl.constexpr = HEAD_DIM // 64 * BLOCK_N
    DTYPE: gl.constexpr = q.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # the last queries see the most keys: first
    row, row_start, num_queries, first_query = row_of_tile(query_start, num_rows, tile, TOKENS)
    if first_query >= num_queries:
        return
    if SKIP_SINGLE:
        if num_queries == 1:
            return
    before = gl.load(seq_lens + row) - num_queries  # keys in front of the row's first query
    left = gl.minimum(num_queries - first_query, TOKENS)
    end = before + first_query + left
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    kv_head = gl.program_id(1) // GROUP_TILES
    first_head = (gl.program_id(1) % GROUP_TILES) * GROUP_TILE
    table = block_tables + row.to(gl.int64) * table_row
    first_token = row_start + first_query
    first_position = before + first_query

    q_tiles = gl.allocate_shared_memory(DTYPE, [PARTS, BLOCK_M, HEAD_DIM], SHARED)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, COUNT, 64], SHARED)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, COUNT, 64], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    clean = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=PARTS)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=PARTS)
    mbarrier.init(clean.index(0), count=1)
    fence_async_shared()
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 0, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 1, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_copy_keys, (boxes, table, k, v, k_full, k_empty, v_full, v_empty, tiles, end, kv_head,
                              BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCK_N, STAGES)),
            ],
            [WARPS, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 0, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 1, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_attend, (q, out, q_tiles, k, v, k_full, k_empty, v_full, v_empty, clean, tiles, end,
                           first_token, left, first_position, kv_head, first_head, qk_scale, q_token,
                           q_head, 2, GROUP, GROUP_TILE, KV_HEADS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
                (_copy_keys, (boxes, table, k, v, k_full, k_empty, v_full, v_empty, tiles, end, kv_head,
                              BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCK_N, STAGES)),
            ],
            [WARPS, WARPS, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
