"""Paged attention for CPUs as TIR, written in vectors of sixteen.

A block of one layer is [2, kv_heads, head_dim * block_size]. Keys lie in tiles of sixteen tokens,
[block_size / 16, head_dim, 16], so that one query element meets sixteen keys in one vector; values
lie token by token, [block_size, head_dim], so that one probability meets sixteen of them.

A row's queries and the heads of a group are one list of entries, walked in tiles of `tile` entries
that share every load of keys and values. Scores of `SPAN` keys are kept before the softmax, so that
maxima and sums cross lanes once a span. What a row computes depends on that row alone.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812 - TVM's own convention

from halyard.hal.kernels.tvm.expressions import LOG2E, fast_exp2, fast_tanh
from halyard.hal.kernels.tvm.shape import LANES, KernelShape, tile_of

__all__ = ["cpu_functions"]

SPAN = 256  # keys whose scores are held at a time
_HIDDEN = -3.0e38  # a score that no query sees; finite, so that differences stay finite
_LOWEST = -1.0e30  # where running maxima start: above hidden scores


def cpu_functions(shape: KernelShape, parallel: bool) -> dict[str, Any]:
    """The functions of a shape by name: write, decode (rows of one query), prefill (all others).

    Args:
        parallel: spread rows and kv heads over TVM's threads.
    """
    return {
        "write": _write(shape),
        "decode": _attend(shape, tile_of(shape, "decode"), True, parallel),
        "prefill": _attend(shape, tile_of(shape, "prefill"), False, parallel),
    }


def _write(shape: KernelShape) -> Any:
    heads, dim, block, dtype = (
        shape.num_kv_heads, shape.head_dim, shape.block_size, shape.dtype
    )  # fmt: skip

    @T.prim_func(s_tir=True)
    def write(
        k_handle: T.handle,
        v_handle: T.handle,
        pool_handle: T.handle,
        slots_handle: T.handle,
        layer: T.int64,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "write", "tirx.noalias": True})
        tokens, slots_length = T.int32(), T.int32()
        layers, blocks = T.int64(), T.int64()
        k0, k1, v0, v1 = T.int32(), T.int32(), T.int32(), T.int32()
        k_offset, v_offset, slots_offset = T.int64(), T.int64(), T.int64()
        k = T.match_buffer(
            k_handle, (tokens, heads, dim), dtype, strides=(k0, k1, 1), elem_offset=k_offset
        )
        v = T.match_buffer(
            v_handle, (tokens, heads, dim), dtype, strides=(v0, v1, 1), elem_offset=v_offset
        )
        pool = T.match_buffer(pool_handle, (layers, blocks, 2, heads, dim * block), dtype)
        slots = T.match_buffer(slots_handle, (slots_length,), "int64", elem_offset=slots_offset)
        for token, head in T.grid(tokens, heads):
            with T.sblock("token"):
                T.reads()
                T.writes()
                slot: T.let[T.int64] = slots[token]
                if slot >= T.int64(0):
                    where: T.let[T.int64] = slot // block
                    offset: T.let[T.int64] = slot % block
                    first: T.let[T.int64] = (offset // LANES) * (dim * LANES) + offset % LANES
                    for d in T.serial(dim):
                        pool[layer, where, 0, head, first + d * LANES] = k[token, head, d]
                    for d in T.serial(dim):
                        pool[layer, where, 1, head, offset * dim + d] = v[token, head, d]

    return write


def _attend(shape: KernelShape, tile: int, decode: bool, parallel: bool) -> Any:
    heads, kv_heads, dim, block = (
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size
    )  # fmt: skip
    group, dtype, softcap, sinks = shape.group, shape.dtype, shape.softcap, shape.sinks
    vectors = dim // LANES
    wide = _largest_divisor(vectors, max(1, 16 // tile))  # value vectors held in registers at once
    chunks = SPAN // LANES
    chunks_in_block = block // LANES
    unit = 1.0 if softcap else LOG2E  # scores are kept in powers of two
    each = T.parallel if parallel else T.serial
    name = "decode" if decode else "prefill"

    @T.prim_func(s_tir=True)
    def attend(
        q_handle: T.handle,
        pool_handle: T.handle,
        out_handle: T.handle,
        tables_handle: T.handle,
        lens_handle: T.handle,
        start_handle: T.handle,
        sinks_handle: T.handle,
        layer: T.int64,
        window: T.int32,
        scale: T.float32,
        cap: T.float32,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": name, "tirx.noalias": True})
        tokens, rows, max_blocks = T.int32(), T.int32(), T.int32()
        layers, blocks = T.int64(), T.int64()
        q0, q1, table_stride = T.int32(), T.int32(), T.int32()
        q_offset, tables_offset = T.int64(), T.int64()
        lens_offset, start_offset, sinks_offset = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(
            q_handle, (tokens, heads, dim), dtype, strides=(q0, q1, 1), elem_offset=q_offset
        )
        pool = T.match_buffer(pool_handle, (layers, blocks, 2, kv_heads, dim * block), dtype)
        out = T.match_buffer(out_handle, (tokens, heads, dim), dtype)
        tables = T.match_buffer(
            tables_handle, (rows, max_blocks), "int32", strides=(table_stride, 1),
            elem_offset=tables_offset,
        )  # fmt: skip
        lens = T.match_buffer(lens_handle, (rows,), "int32", elem_offset=lens_offset)
        start = T.match_buffer(start_handle, (rows + 1,), "int32", elem_offset=start_offset)
        sink = T.match_buffer(sinks_handle, (heads,), "float32", elem_offset=sinks_offset)
        for part in each(rows * kv_heads):
            with T.sblock("row"):
                T.reads()
                T.writes()
                query = T.sblock_alloc_buffer((tile * dim,), "float32")
                scores = T.sblock_alloc_buffer((tile * SPAN,), "float32")
                total = T.sblock_alloc_buffer((tile * dim,), "float32")
                dots = T.sblock_alloc_buffer((tile * LANES,), "float32")
                sums = T.sblock_alloc_buffer((tile * wide * LANES,), "float32")
                top = T.sblock_alloc_buffer((LANES,), "float32")
                weight = T.sblock_alloc_buffer((tile * LANES,), "float32")
                best = T.sblock_alloc_buffer((tile,), "float32")
                one = T.sblock_alloc_buffer((2,), "float32")
                row: T.let[T.int32] = part // kv_heads
                head: T.let[T.int32] = part % kv_heads
                first: T.let[T.int32] = start[row]
                count: T.let[T.int32] = start[row + 1] - first
                length: T.let[T.int32] = lens[row]
                entries: T.let[T.int32] = count * group
                if (count == 1) if decode else (count > 1):
                    for turn in T.serial((entries + (tile - 1)) // tile):
                        base: T.let[T.int32] = turn * tile
                        early: T.let[T.int32] = length - count + base // group
                        limit: T.let[T.int32] = (
                            length - count + T.min(base + tile - 1, entries - 1) // group + 1
                        )
                        begin: T.let[T.int32] = T.max(early - window + 1, 0)
                        # Entries past the end repeat the last one and are not stored.
                        for e in T.serial(tile):
                            source: T.let[T.int32] = T.min(base + e, entries - 1)
                            for j in T.serial(vectors):
                                for lane in T.vectorized(LANES):
                                    query[e * dim + j * LANES + lane] = T.Cast(
                                        "float32",
                                        q[
                                            first + source // group,
                                            head * group + source % group,
                                            j * LANES + lane,
                                        ],
                                    ) * (scale * T.float32(unit))
                                    total[e * dim + j * LANES + lane] = T.float32(0)
                            for lane in T.vectorized(LANES):
                                weight[e * LANES + lane] = T.float32(0)
                            best[e] = T.float32(_LOWEST)
                        for leap in T.serial((limit + (SPAN - 1)) // SPAN - begin // SPAN):
                            span: T.let[T.int32] = begin // SPAN + leap
                            low: T.let[T.int32] = T.max(span * chunks, begin // LANES)
                            high: T.let[T.int32] = T.min(
                                span * chunks + chunks, (limit + (LANES - 1)) // LANES
                            )
                            for step in T.serial(high - low):
                                chunk: T.let[T.int32] = low + step
                                at: T.let[T.int64] = T.Cast(
                                    "int64", tables[row, chunk // chunks_in_block]
                                )
                                inner: T.let[T.int32] = (chunk % chunks_in_block) * (dim * LANES)
                                for e in T.unroll(tile):
                                    for lane in T.vectorized(LANES):
                                        dots[e * LANES + lane] = T.float32(0)
                                for d in T.serial(dim):
                                    for e in T.unroll(tile):
                                        for lane in T.vectorized(LANES):
                                            dots[e * LANES + lane] += query[e * dim + d] * T.Cast(
                                                "float32",
                                                pool[layer, at, 0, head, inner + d * LANES + lane],
                                            )
                                for e in T.unroll(tile):
                                    place: T.let[T.int32] = (
                                        length - count + T.min(base + e, entries - 1) // group
                                    )
                                    for lane in T.vectorized(LANES):
                                        scores[
                                            e * SPAN + (chunk - span * chunks) * LANES + lane
                                        ] = T.Select(
                                            T.And(
                                                chunk * LANES + lane <= place,
                                                place - (chunk * LANES + lane) < window,
                                            ),
                                            fast_tanh(dots[e * LANES + lane] / cap)
                                            * (cap * T.float32(LOG2E))
                                            if softcap
                                            else dots[e * LANES + lane],
                                            T.float32(_HIDDEN),
                                        )
                            for e in T.serial(tile):
                                for lane in T.vectorized(LANES):
                                    top[lane] = T.float32(_HIDDEN)
                                for step in T.serial(high - low):
                                    for lane in T.vectorized(LANES):
                                        top[lane] = T.max(
                                            top[lane],
                                            scores[
                                                e * SPAN
                                                + (low + step - span * chunks) * LANES
                                                + lane
                                            ],
                                        )
                                one[0] = best[e]
                                for lane in T.unroll(LANES):
                                    one[0] = T.max(one[0], top[lane])
                                one[1] = fast_exp2(best[e] - one[0])
                                best[e] = one[0]
                                for lane in T.vectorized(LANES):
                                    weight[e * LANES + lane] *= one[1]
                                for step in T.serial(high - low):
                                    for lane in T.vectorized(LANES):
                                        scores[
                                            e * SPAN + (low + step - span * chunks) * LANES + lane
                                        ] = fast_exp2(
                                            scores[
                                                e * SPAN
                                                + (low + step - span * chunks) * LANES
                                                + lane
                                            ]
                                            - one[0]
                                        )
                                    for lane in T.vectorized(LANES):
                                        weight[e * LANES + lane] += scores[
                                            e * SPAN + (low + step - span * chunks) * LANES + lane
                                        ]
                                for j in T.serial(vectors):
                                    for lane in T.vectorized(LANES):
                                        total[e * dim + j * LANES + lane] *= one[1]
                            for strip in T.serial(vectors // wide):
                                for e, j in T.grid(tile, wide):
                                    for lane in T.vectorized(LANES):
                                        sums[(e * wide + j) * LANES + lane] = total[
                                            e * dim + (strip * wide + j) * LANES + lane
                                        ]
                                for step in T.serial(high - low):
                                    chunk_v: T.let[T.int32] = low + step
                                    at_v: T.let[T.int64] = T.Cast(
                                        "int64", tables[row, chunk_v // chunks_in_block]
                                    )
                                    token0: T.let[T.int32] = (chunk_v % chunks_in_block) * LANES
                                    # Unused slots hold anything, NaN included: they are not read.
                                    for t in T.serial(T.min(LANES, limit - chunk_v * LANES)):
                                        for e in T.unroll(tile):
                                            for j in T.unroll(wide):
                                                for lane in T.vectorized(LANES):
                                                    sums[(e * wide + j) * LANES + lane] += scores[
                                                        e * SPAN
                                                        + (chunk_v - span * chunks) * LANES
                                                        + t
                                                    ] * T.Cast(
                                                        "float32",
                                                        pool[
                                                            layer, at_v, 1, head,
                                                            (token0 + t) * dim
                                                            + (strip * wide + j) * LANES
                                                            + lane,
                                                        ],
                                                    )  # fmt: skip
                                for e, j in T.grid(tile, wide):
                                    for lane in T.vectorized(LANES):
                                        total[e * dim + (strip * wide + j) * LANES + lane] = sums[
                                            (e * wide + j) * LANES + lane
                                        ]
                        for e in T.serial(tile):
                            if base + e < entries:
                                one[0] = T.float32(0)
                                for lane in T.unroll(LANES):
                                    one[0] += weight[e * LANES + lane]
                                if sinks:
                                    one[0] += fast_exp2(
                                        sink[head * group + (base + e) % group] * T.float32(LOG2E)
                                        - best[e]
                                    )
                                for j in T.serial(vectors):
                                    for lane in T.vectorized(LANES):
                                        out[
                                            first + (base + e) // group,
                                            head * group + (base + e) % group,
                                            j * LANES + lane,
                                        ] = T.Cast(
                                            dtype, total[e * dim + j * LANES + lane] / one[0]
                                        )

    return attend


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if number % n == 0)
