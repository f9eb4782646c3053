"""The loop of Hopper's own attention kernels: a tile of values is multiplied while the next tile's
softmax runs.

Triton waits for a product before it goes on. Gluon, its lower-level language, leaves that to the
kernel, and the matrix units and the exponentials of one program work at the same time.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["attend_tiles", "load_layout", "out_layout", "row_of_tile", "score_layout", "soften"]


@gluon.constexpr_function
def load_layout(BLOCK_N: int, HEAD_DIM: int, WARPS: int) -> Any:
    """Of [rows, HEAD_DIM] from memory: 16 bytes a thread, and of a tile some neighbouring keys."""
    line = HEAD_DIM // 8
    return gl.BlockedLayout(
        [BLOCK_N * line // (32 * WARPS), 8], [32 // line, line], [WARPS, 1], [1, 0]
    )


@gluon.constexpr_function
def score_layout(BLOCK_N: int, WARPS: int) -> Any:
    """Of scores [queries, BLOCK_N]."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])


@gluon.constexpr_function
def out_layout(HEAD_DIM: int, WARPS: int) -> Any:
    """Of sums [queries, HEAD_DIM]."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])


@gluon.jit
def row_of_tile(
    query_start: gl.tensor, num_rows: gl.tensor, tile: gl.tensor, TOKENS: gl.constexpr
) -> gl.tensor:
    """(row, its first token, its number of queries, the tile's first query of them) of a prefill's tile.

    A row has at most one tile that is idle: its first query is none of the row's.
    """
    row = num_rows * 0  # a tensor, also where the loop has nothing to do
    after = num_rows
    while after - row > 1:
        middle = (row + after) // 2
        begins = gl.load(query_start + middle) // TOKENS + middle
        row = gl.where(begins <= tile, middle, row)
        after = gl.where(begins <= tile, after, middle)
    row_start = gl.load(query_start + row)
    num_queries = gl.load(query_start + row + 1) - row_start
    return row, row_start, num_queries, (tile - (row_start // TOKENS + row)) * TOKENS


@gluon.jit
def _blocks_of(
    table: gl.tensor, tile: gl.tensor, end: gl.tensor, lane: gl.tensor,
    BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, WHOLE: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The blocks that a tile's keys are in, a thread's own. Read a turn before the copy needs them."""
    key = tile * BLOCK_N + lane
    place = table + key.to(gl.uint32) // BLOCK_SIZE  # not negative: a shift
    if WHOLE:
        return gl.load(place)
    return gl.load(place, mask=key < end, other=0)


@gluon.jit
def _copy_tile(
    target: gl.shared_memory_descriptor, slots: gl.tensor, blocks: gl.tensor, tile: gl.tensor,
    end: gl.tensor, lane: gl.tensor, own: gl.tensor,
    BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_STRIDE: gl.constexpr,
    BLOCK_N: gl.constexpr, WHOLE: gl.constexpr, LOAD: gl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy a tile of keys or values; slots past the end aren't read and become zeros.

    slots [groups, keys of one, HEAD_DIM]: where block 0 has those of a tile that begins with a block.
    WHOLE: no key is past the end.
    """
    offset = blocks.to(gl.int64) * BLOCK_STRIDE
    if BLOCK_SIZE > BLOCK_N:  # a tile begins within a block
        key = (tile * BLOCK_N + lane).to(gl.uint32)
        offset += (key % BLOCK_SIZE - lane.to(gl.uint32)).to(gl.int64) * HEAD_DIM
    place = gl.reshape(slots + offset[:, None][:, :, None], [BLOCK_N, HEAD_DIM])
    place = gl.convert_layout(place, LOAD, assert_trivial=True)
    # 16 bytes in one piece: what the compiler knew before the reshape.
    place = gl.max_contiguous(gl.multiple_of(place, [16, 16]), [1, 8])
    if WHOLE:
        async_copy.async_copy_global_to_shared(target, place)
    else:
        key = tile * BLOCK_N + lane[:, None] + own[None, :]
        inside = gl.convert_layout(gl.reshape(key < end, [BLOCK_N]), gl.SliceLayout(1, LOAD))
        async_copy.async_copy_global_to_shared(target, place, mask=inside[:, None])


@gluon.jit
def _halves(x: gl.tensor, ROWS: gl.constexpr, COLUMNS: gl.constexpr) -> gl.tensor:
    """Both halves of the columns, each thread those that it holds."""
    return gl.split(gl.permute(gl.reshape(x, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@gluon.jit
def soften(
    score: gl.tensor, total: gl.tensor, peak: gl.tensor, tile: gl.tensor, position: gl.tensor,
    column: gl.tensor, qk_scale: gl.tensor,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr, DTYPE: gl.constexpr,
    SCORE: gl.constexpr, OUT: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Scores of a tile to (weights as an operand, factor of earlier sums, total, peak)."""
    ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    if MASKED:
        key = tile * BLOCK_N + column
        score = gl.where(key[None, :] <= position[:, None], score, float("-inf"))
    # A reduction is a chain of instructions, and few warps are there to fill the gaps: the first steps
    # by hand, beside each other.
    first, second = _halves(score, BLOCK_M, BLOCK_N)
    first, second = _halves(gl.maximum(first, second), BLOCK_M, BLOCK_N // 2)
    largest = gl.convert_layout(gl.max(gl.maximum(first, second), 1), ROW)
    new_peak = gl.maximum(peak, largest * qk_scale)
    shrink = gl.exp2(peak - new_peak)
    weight = gl.exp2(score * qk_scale - new_peak[:, None])
    first, second = _halves(weight, BLOCK_M, BLOCK_N)
    first, second = _halves(first + second, BLOCK_M, BLOCK_N // 2)
    total = total * shrink + gl.convert_layout(gl.sum(first + second, 1), ROW)
    operand = gl.convert_layout(weight.to(DTYPE), gl.DotOperandLayout(0, OUT, 2))
    return operand, gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), total, new_peak


@gluon.jit
def _fold_tile(
    q: gl.shared_memory_descriptor, k: gl.shared_memory_descriptor,
    v: gl.shared_memory_descriptor, acc: gl.tensor, total: gl.tensor, peak: gl.tensor,
    weight: gl.tensor, v_blocks: gl.tensor, k_blocks: gl.tensor,
    keys: gl.tensor, values: gl.tensor, table: gl.tensor, tile: gl.tensor,
    end: gl.tensor, position: gl.tensor, qk_scale: gl.tensor, lane: gl.tensor, own: gl.tensor,
    column: gl.tensor,
    BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_STRIDE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr, WHOLE: gl.constexpr,
    MASKED: gl.constexpr, LOAD: gl.constexpr, SCORE: gl.constexpr, OUT: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Fold a tile, whose weights are there, into acc, and make those of the next one meanwhile.

    WHOLE: of what is begun to be read no key is past the end. MASKED: some query doesn't see some key
    of the next tile.

    Both products begin together; the softmax needs the first one's end alone. No product is under way
    at the end: ptxas gives each instruction a wait of its own where one goes on into the next turn.
    No fence between copies and products, as in Triton 3.6's own loops; 3.7 puts one in by itself.
    """
    async_copy.wait_group(AHEAD - 1)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORE)
    next_keys = k.index((tile + 1) % (AHEAD + 1)).permute((1, 0))
    coming = warpgroup_mma(q, next_keys, zeros, use_acc=False, is_async=True)
    sums = warpgroup_mma(weight, v.index(tile % (AHEAD + 1)), acc, is_async=True)
    further = tile + AHEAD
    slot = further % (AHEAD + 1)
    _copy_tile(
        k.index((slot + 1) % (AHEAD + 1)), keys, k_blocks, further + 1, end, lane, own,
        BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_N, WHOLE, LOAD,
    )  # fmt: skip
    _copy_tile(
        v.index(slot), values, v_blocks, further, end, lane, own,
        BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_N, WHOLE, LOAD,
    )  # fmt: skip
    async_copy.commit_group()
    v_blocks = k_blocks
    k_blocks = _blocks_of(table, further + 2, end, lane, BLOCK_SIZE, BLOCK_N, WHOLE)
    score = warpgroup_mma_wait(1, deps=[coming])
    weight, shrink, total, peak = soften(
        score, total, peak, tile + 1, position, column, qk_scale, BLOCK_M, BLOCK_N, MASKED,
        q.dtype, SCORE, OUT,
    )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[sums]) * shrink[:, None]
    return acc, total, peak, weight, v_blocks, k_blocks


@gluon.jit
def attend_tiles(
    query: gl.tensor, keys: gl.tensor, table: gl.tensor, end: gl.tensor, position: gl.tensor,
    least: gl.tensor, qk_scale: gl.tensor,
    BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_STRIDE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr, DTYPE: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """(sums [BLOCK_M, HEAD_DIM] in out_layout, total and peak [BLOCK_M] in score_layout's rows, fp32) of
    the keys 0 .. end - 1 of one sequence and one kv head; end is at least 1.

    query [BLOCK_M, HEAD_DIM] in load_layout, as stored; keys: those of that head in block 0, its values
    lie half a BLOCK_STRIDE further; position [BLOCK_M] in score_layout's rows: the last key that a query
    sees, of all at least `least`. AHEAD: tiles on their way beside the one in use, at least 1.
    """
    WARPS: gl.constexpr = gl.num_warps()
    LINE: gl.constexpr = HEAD_DIM // 8
    OWN: gl.constexpr = BLOCK_N * LINE // (32 * WARPS)  # neighbouring keys, which are in one block
    LOAD: gl.constexpr = load_layout(BLOCK_N, HEAD_DIM, WARPS)
    GROUPS: gl.constexpr = gl.BlockedLayout(
        [1, OWN, 8], [32 // LINE, 1, LINE], [WARPS, 1, 1], [2, 1, 0]
    )
    SCORE: gl.constexpr = score_layout(BLOCK_N, WARPS)
    OUT: gl.constexpr = out_layout(HEAD_DIM, WARPS)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HEAD_DIM], SHARED)
    k = gl.allocate_shared_memory(DTYPE, [AHEAD + 1, BLOCK_N, HEAD_DIM], SHARED)
    v = gl.allocate_shared_memory(DTYPE, [AHEAD + 1, BLOCK_N, HEAD_DIM], SHARED)

    group: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, GROUPS))
    lane = gl.arange(0, BLOCK_N // OWN, group) * OWN
    own = gl.arange(0, OWN, gl.SliceLayout(0, gl.SliceLayout(2, GROUPS)))
    part = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(0, GROUPS)))
    slots = (lane % BLOCK_SIZE * HEAD_DIM)[:, None] + (own * HEAD_DIM)[None, :]
    keys = keys + slots[:, :, None] + part[None, :][None, :, :]
    values = keys + BLOCK_STRIDE // 2
    v_blocks = _blocks_of(table, 0, end, lane, BLOCK_SIZE, BLOCK_N, False)
    _copy_tile(
        k.index(0), keys, v_blocks, 0, end, lane, own,
        BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_N, False, LOAD,
    )  # fmt: skip
    async_copy.commit_group()
    for ahead in gl.static_range(AHEAD):
        k_blocks = _blocks_of(table, ahead + 1, end, lane, BLOCK_SIZE, BLOCK_N, False)
        _copy_tile(
            k.index((ahead + 1) % (AHEAD + 1)), keys, k_blocks, ahead + 1, end, lane, own,
            BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_N, False, LOAD,
        )  # fmt: skip
        _copy_tile(
            v.index(ahead), values, v_blocks, ahead, end, lane, own,
            BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_N, False, LOAD,
        )  # fmt: skip
        async_copy.commit_group()
        v_blocks = k_blocks
    k_blocks = _blocks_of(table, AHEAD + 1, end, lane, BLOCK_SIZE, BLOCK_N, False)
    q.store(query)
    fence_async_shared()

    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORE))
    total = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, SCORE))
    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORE))
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, OUT)
    async_copy.wait_group(AHEAD)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORE)
    score = warpgroup_mma(q, k.index(0).permute((1, 0)), zeros, use_acc=False)
    weight, _, total, peak = soften(
        score, total, peak, 0, position, column, qk_scale, BLOCK_M, BLOCK_N, True, DTYPE, SCORE, OUT
    )
    last = (end + BLOCK_N - 1) // BLOCK_N - 1
    seen = gl.maximum((least + 1) // BLOCK_N - 1, 0)
    whole = gl.maximum(gl.minimum(seen, end // BLOCK_N - AHEAD - 2), 0)
    for number in range(whole):
        acc, total, peak, weight, v_blocks, k_blocks = _fold_tile(
            q, k, v, acc, total, peak, weight, v_blocks, k_blocks, keys, values, table, number,
            end, position, qk_scale, lane, own, column,
            BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_M, BLOCK_N, AHEAD, True, False, LOAD, SCORE, OUT,
        )  # fmt: skip
    for number in range(whole, seen):
        acc, total, peak, weight, v_blocks, k_blocks = _fold_tile(
            q, k, v, acc, total, peak, weight, v_blocks, k_blocks, keys, values, table, number,
            end, position, qk_scale, lane, own, column,
            BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_M, BLOCK_N, AHEAD, False, False, LOAD, SCORE, OUT,
        )  # fmt: skip
    for number in range(seen, last):
        acc, total, peak, weight, v_blocks, k_blocks = _fold_tile(
            q, k, v, acc, total, peak, weight, v_blocks, k_blocks, keys, values, table, number,
            end, position, qk_scale, lane, own, column,
            BLOCK_SIZE, HEAD_DIM, BLOCK_STRIDE, BLOCK_M, BLOCK_N, AHEAD, False, True, LOAD, SCORE, OUT,
        )  # fmt: skip
    async_copy.wait_group(0)
    acc = warpgroup_mma(weight, v.index(last % (AHEAD + 1)), acc)
    return acc, total, peak
