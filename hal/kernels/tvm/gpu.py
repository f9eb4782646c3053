"""Paged attention for GPUs as TIR: one source for CUDA, ROCm, Metal, OpenCL and WebGPU.

A block of one layer is [2, kv_heads, block_size * head_dim]: the keys (values) of one head lie token
by token. As on the CPU, a row's queries and the heads of a group are one list of entries in tiles of
`tile`; a thread block does one tile of one row and kv head. Of each `THREADS` keys a thread scores
one for all entries, sixteen threads an entry do the softmax, and each thread sums some of the tile's
outputs. Nothing crosses threads but through shared memory, so that every target can say it.

A decode row longer than SPLIT keys is cut into up to PARTS parts, a thread block each, and merged:
otherwise a small batch would leave a large chip idle. Where it is cut depends on its length alone, so
what a row computes does not depend on the others.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812 - TVM's own convention

from halyard.hal.kernels.tvm.expressions import LOG2E
from halyard.hal.kernels.tvm.shape import PARTS, SPLIT, KernelShape, tile_of

__all__ = ["gpu_functions"]

THREADS = 128  # a thread block; also the keys done at a time
_LANES = 16  # threads an entry in the softmax: 8 * _LANES == THREADS
_VECTOR = 4  # elements a load of keys: what every target has vectors of
_HIDDEN = -3.0e38  # a score that no query sees; finite, so that differences stay finite
_LOWEST = -1.0e30  # where running maxima start: above hidden scores


def gpu_functions(shape: KernelShape, index: str = "int64") -> dict[str, Any]:
    """The functions of a shape by name: write, decode (rows of one query), prefill (all others);
    decode_split and merge do what decode does.

    Args:
        index: the dtype of places in the pool and of slots; int32 where a target has no other.
    """
    return {
        "write": _write(shape, index),
        "decode": _attend(shape, "decode", index),
        "decode_split": _attend(shape, "decode_split", index),
        "merge": _merge(shape),
        "prefill": _attend(shape, "prefill", index),
    }


def _write(shape: KernelShape, index: str) -> Any:
    heads, dim, block, dtype = (
        shape.num_kv_heads, shape.head_dim, shape.block_size, shape.dtype
    )  # fmt: skip
    size = heads * dim

    @T.prim_func(s_tir=True)
    def write(
        k_handle: T.handle,
        v_handle: T.handle,
        pool_handle: T.handle,
        slots_handle: T.handle,
        layer: T.int32,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "write", "tirx.noalias": True})
        tokens, slots_length = T.int32(), T.int32()
        layers, blocks = T.int32(), T.int32()
        k0, k1, v0, v1 = T.int32(), T.int32(), T.int32(), T.int32()
        k_offset, v_offset, slots_offset = T.int32(), T.int32(), T.int32()
        k = T.match_buffer(
            k_handle, (tokens, heads, dim), dtype, strides=(k0, k1, 1), elem_offset=k_offset
        )
        v = T.match_buffer(
            v_handle, (tokens, heads, dim), dtype, strides=(v0, v1, 1), elem_offset=v_offset
        )
        pool = T.match_buffer(pool_handle, (layers, blocks, 2, heads, block * dim), dtype)
        slots = T.match_buffer(slots_handle, (slots_length,), index, elem_offset=slots_offset)
        for token in T.thread_binding(tokens, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                with T.sblock("token"):
                    T.reads()
                    T.writes()
                    for turn in T.serial((size + (THREADS - 1)) // THREADS):
                        if turn * THREADS + thread < size and slots[token] >= T.Cast(index, 0):
                            pool[
                                T.Cast(index, layer),
                                slots[token] // block,
                                0,
                                (turn * THREADS + thread) // dim,
                                (slots[token] % block) * dim + (turn * THREADS + thread) % dim,
                            ] = k[
                                token,
                                (turn * THREADS + thread) // dim,
                                (turn * THREADS + thread) % dim,
                            ]
                            pool[
                                T.Cast(index, layer),
                                slots[token] // block,
                                1,
                                (turn * THREADS + thread) // dim,
                                (slots[token] % block) * dim + (turn * THREADS + thread) % dim,
                            ] = v[
                                token,
                                (turn * THREADS + thread) // dim,
                                (turn * THREADS + thread) % dim,
                            ]

    return write


def _attend(shape: KernelShape, name: str, index: str) -> Any:
    heads, kv_heads, dim, block = (
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size
    )  # fmt: skip
    group, dtype, softcap, sinks = shape.group, shape.dtype, shape.softcap, shape.sinks
    unit = 1.0 if softcap else LOG2E  # scores are kept in powers of two
    decode, split = name != "prefill", name == "decode_split"
    tile = tile_of(shape, "decode" if decode else name)
    size = tile * dim
    shares = -(-size // THREADS)  # outputs a thread
    most = PARTS * THREADS

    @T.prim_func(s_tir=True)
    def attend(
        q_handle: T.handle,
        pool_handle: T.handle,
        out_handle: T.handle,
        tables_handle: T.handle,
        lens_handle: T.handle,
        start_handle: T.handle,
        sinks_handle: T.handle,
        layer: T.int32,
        window: T.int32,
        scale: T.float32,
        cap: T.float32,
        tiles: T.int32,
        partial_handle: T.handle,
        stats_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": name, "tirx.noalias": True})
        tokens, rows, max_blocks = T.int32(), T.int32(), T.int32()
        layers, blocks = T.int32(), T.int32()
        q0, q1, table_stride = T.int32(), T.int32(), T.int32()
        q_offset, tables_offset = T.int32(), T.int32()
        lens_offset, start_offset, sinks_offset = T.int32(), T.int32(), T.int32()
        q = T.match_buffer(
            q_handle, (tokens, heads, dim), dtype, strides=(q0, q1, 1), elem_offset=q_offset
        )
        pool = T.match_buffer(pool_handle, (layers, blocks, 2, kv_heads, block * dim), dtype)
        out = T.match_buffer(out_handle, (tokens, heads, dim), dtype)
        tables = T.match_buffer(
            tables_handle, (rows, max_blocks), "int32", strides=(table_stride, 1),
            elem_offset=tables_offset,
        )  # fmt: skip
        lens = T.match_buffer(lens_handle, (rows,), "int32", elem_offset=lens_offset)
        start = T.match_buffer(start_handle, (rows + 1,), "int32", elem_offset=start_offset)
        sink = T.match_buffer(sinks_handle, (heads,), "float32", elem_offset=sinks_offset)
        # Of each part of a row: sums before they are divided; the maximum and the sum of weights.
        split_rows, parts = T.int32(), T.int32()
        partial = T.match_buffer(partial_handle, (split_rows, parts, heads, dim), "float32")
        stats = T.match_buffer(stats_handle, (split_rows, parts, heads, 2), "float32")
        for row in T.thread_binding(rows, thread="blockIdx.x"):
            # WebGPU has no third dimension of blocks: heads and tiles share one.
            for place in T.thread_binding(kv_heads * tiles * parts, thread="blockIdx.y"):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    with T.sblock("tile"):
                        T.reads()
                        T.writes()
                        head: T.let[T.int32] = place % kv_heads
                        turn: T.let[T.int32] = T.truncmod(T.truncdiv(place, kv_heads), tiles)
                        part: T.let[T.int32] = T.truncdiv(place, kv_heads * tiles)
                        query = T.sblock_alloc_buffer((tile, dim), "float32", scope="shared")
                        scores = T.sblock_alloc_buffer((tile, THREADS), "float32", scope="shared")
                        tops = T.sblock_alloc_buffer((tile, _LANES), "float32", scope="shared")
                        totals = T.sblock_alloc_buffer((tile, _LANES), "float32", scope="shared")
                        weights = T.sblock_alloc_buffer((tile, THREADS), "float32", scope="shared")
                        decay = T.sblock_alloc_buffer((tile,), "float32", scope="shared")
                        peaks = T.sblock_alloc_buffer((tile,), "float32", scope="shared")
                        # Of the entry that this thread does the softmax of.
                        peak = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        dots = T.sblock_alloc_buffer((tile,), "float32", scope="local")
                        key = T.sblock_alloc_buffer((_VECTOR,), dtype, scope="local")
                        sums = T.sblock_alloc_buffer((shares,), "float32", scope="local")
                        one = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        first: T.let[T.int32] = start[row]
                        count: T.let[T.int32] = start[row + 1] - first
                        length: T.let[T.int32] = lens[row]
                        entries: T.let[T.int32] = count * group
                        base: T.let[T.int32] = turn * tile
                        # Barriers may not stand under a condition: a tile that is not there
                        # takes no step and stores nothing.
                        here: T.let[T.bool] = T.And(
                            (count == 1) if decode else (count > 1), base < entries
                        )
                        early: T.let[T.int32] = length - count + base // group
                        last: T.let[T.int32] = (
                            length - count
                            + T.min(base + tile - 1, entries - 1) // group + 1
                        )  # fmt: skip
                        span: T.let[T.int32] = T.max(SPLIT, (length + (most - 1)) // most * THREADS)
                        limit: T.let[T.int32] = T.min(last, (part + 1) * span) if split else last
                        begin: T.let[T.int32] = (
                            T.max(T.max(early - window + 1, 0), part * span if split else 0)
                            // THREADS
                        )
                        # Entries past the end repeat the last one and are not stored. Rows without
                        # tokens (padding of a captured step) read nothing.
                        for i in T.unroll(shares):
                            if here and i * THREADS + thread < size:
                                query[
                                    (i * THREADS + thread) // dim,
                                    (i * THREADS + thread) % dim,
                                ] = T.Cast(
                                    "float32",
                                    q[
                                        first
                                        + T.min(
                                            base + (i * THREADS + thread) // dim,
                                            entries - 1,
                                        ) // group,
                                        head * group
                                        + T.min(
                                            base + (i * THREADS + thread) // dim,
                                            entries - 1,
                                        ) % group,
                                        (i * THREADS + thread) % dim,
                                    ],
                                ) * (scale * T.float32(unit))  # fmt: skip
                            sums[i] = T.float32(0)
                        total[0] = T.float32(0)
                        peak[0] = T.float32(_LOWEST)
                        T.tvm_storage_sync("shared")
                        for leap in T.serial(
                            T.Select(here, T.max((limit + (THREADS - 1)) // THREADS - begin, 0), 0)
                        ):
                            low: T.let[T.int32] = (begin + leap) * THREADS
                            token: T.let[T.int32] = low + thread
                            # Scores: this thread's key against every entry.
                            for e in T.unroll(tile):
                                dots[e] = T.float32(0)
                            if token < limit:
                                for d in T.serial(dim // _VECTOR):
                                    for n in T.vectorized(_VECTOR):
                                        key[n] = pool[
                                            T.Cast(index, layer),
                                            T.Cast(index, tables[row, token // block]),
                                            0,
                                            head,
                                            (token % block) * dim + d * _VECTOR + n,
                                        ]
                                    for n in T.unroll(_VECTOR):
                                        for e in T.unroll(tile):
                                            dots[e] += query[e, d * _VECTOR + n] * T.Cast(
                                                "float32", key[n]
                                            )
                            for e in T.unroll(tile):
                                at: T.let[T.int32] = (
                                    length - count
                                    + T.min(base + e, entries - 1) // group
                                )  # fmt: skip
                                scores[e, thread] = T.Select(
                                    T.And(token <= at, at - token < window),
                                    T.tanh(dots[e] / cap) * (cap * T.float32(LOG2E))
                                    if softcap
                                    else dots[e],
                                    T.float32(_HIDDEN),
                                )
                            T.tvm_storage_sync("shared")
                            # Softmax: sixteen threads an entry.
                            if thread // _LANES < tile:
                                one[0] = T.float32(_HIDDEN)
                                for n in T.serial(THREADS // _LANES):
                                    one[0] = T.max(
                                        one[0],
                                        scores[
                                            thread // _LANES,
                                            n * _LANES + thread % _LANES,
                                        ],
                                    )
                                tops[thread // _LANES, thread % _LANES] = one[0]
                            T.tvm_storage_sync("shared")
                            if thread // _LANES < tile:
                                one[0] = peak[0]
                                for n in T.serial(_LANES):
                                    one[0] = T.max(one[0], tops[thread // _LANES, n])
                                peak[0] = T.exp2(peak[0] - one[0])
                                total[0] = total[0] * peak[0]
                                if thread % _LANES == 0:
                                    decay[thread // _LANES] = peak[0]
                                peak[0] = one[0]
                                for n in T.serial(THREADS // _LANES):
                                    one[0] = T.exp2(
                                        scores[thread // _LANES, n * _LANES + thread % _LANES]
                                        - peak[0]
                                    )
                                    weights[thread // _LANES, n * _LANES + thread % _LANES] = one[0]
                                    total[0] += one[0]
                            T.tvm_storage_sync("shared")
                            # Values. Unused slots hold anything: they are not read.
                            for i in T.unroll(shares):
                                if i * THREADS + thread < size:
                                    sums[i] *= decay[(i * THREADS + thread) // dim]
                            for t in T.serial(T.min(THREADS, limit - low)):
                                for i in T.unroll(shares):
                                    if i * THREADS + thread < size:
                                        sums[i] += weights[
                                            (i * THREADS + thread) // dim, t
                                        ] * T.Cast(
                                            "float32",
                                            pool[
                                                T.Cast(index, layer),
                                                T.Cast(
                                                    index,
                                                    tables[row, (low + t) // block],
                                                ),
                                                1,
                                                head,
                                                ((low + t) % block) * dim
                                                + (i * THREADS + thread) % dim,
                                            ],
                                        )
                            T.tvm_storage_sync("shared")
                        if thread // _LANES < tile:
                            totals[thread // _LANES, thread % _LANES] = total[0]
                            if thread % _LANES == 0:
                                peaks[thread // _LANES] = peak[0]
                        T.tvm_storage_sync("shared")
                        for i in T.unroll(shares):
                            entry: T.let[T.int32] = base + (i * THREADS + thread) // dim
                            if here and i * THREADS + thread < size and entry < entries:
                                one[0] = T.float32(0)
                                for n in T.serial(_LANES):
                                    one[0] += totals[(i * THREADS + thread) // dim, n]
                                if split:
                                    partial[
                                        row,
                                        part,
                                        head * group + entry,
                                        (i * THREADS + thread) % dim,
                                    ] = sums[i]
                                    if (i * THREADS + thread) % dim == 0:
                                        stats[row, part, head * group + entry, 0] = peaks[
                                            (i * THREADS + thread) // dim
                                        ]
                                        stats[row, part, head * group + entry, 1] = one[0]
                                else:
                                    if sinks:
                                        one[0] += T.exp2(
                                            sink[head * group + entry % group] * T.float32(LOG2E)
                                            - peaks[(i * THREADS + thread) // dim]
                                        )
                                    out[
                                        first + entry // group,
                                        head * group + entry % group,
                                        (i * THREADS + thread) % dim,
                                    ] = T.Cast(dtype, sums[i] / one[0])

    return attend


def _merge(shape: KernelShape) -> Any:
    """Put a row's parts together; a thread block does one head of one row."""
    heads, dim, dtype, sinks = shape.num_heads, shape.head_dim, shape.dtype, shape.sinks
    most = PARTS * THREADS

    @T.prim_func(s_tir=True)
    def merge(
        partial_handle: T.handle,
        stats_handle: T.handle,
        out_handle: T.handle,
        lens_handle: T.handle,
        start_handle: T.handle,
        sinks_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "merge", "tirx.noalias": True})
        tokens, rows, parts = T.int32(), T.int32(), T.int32()
        lens_offset, start_offset, sinks_offset = T.int32(), T.int32(), T.int32()
        partial = T.match_buffer(partial_handle, (rows, parts, heads, dim), "float32")
        stats = T.match_buffer(stats_handle, (rows, parts, heads, 2), "float32")
        out = T.match_buffer(out_handle, (tokens, heads, dim), dtype)
        lens = T.match_buffer(lens_handle, (rows,), "int32", elem_offset=lens_offset)
        start = T.match_buffer(start_handle, (rows + 1,), "int32", elem_offset=start_offset)
        sink = T.match_buffer(sinks_handle, (heads,), "float32", elem_offset=sinks_offset)
        for row in T.thread_binding(rows, thread="blockIdx.x"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    with T.sblock("head"):
                        T.reads()
                        T.writes()
                        peak = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        one = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        count: T.let[T.int32] = start[row + 1] - start[row]
                        span: T.let[T.int32] = T.max(
                            SPLIT, (lens[row] + (most - 1)) // most * THREADS
                        )
                        used: T.let[T.int32] = T.min((lens[row] + (span - 1)) // span, parts)
                        if count == 1:
                            peak[0] = T.float32(_LOWEST)
                            for n in T.serial(used):
                                peak[0] = T.max(peak[0], stats[row, n, head, 0])
                            total[0] = T.float32(0)
                            for n in T.serial(used):
                                total[0] += stats[row, n, head, 1] * T.exp2(
                                    stats[row, n, head, 0] - peak[0]
                                )
                            if sinks:
                                total[0] += T.exp2(sink[head] * T.float32(LOG2E) - peak[0])
                            for turn in T.serial((dim + (THREADS - 1)) // THREADS):
                                if turn * THREADS + thread < dim:
                                    one[0] = T.float32(0)
                                    for n in T.serial(used):
                                        one[0] += partial[
                                            row, n, head, turn * THREADS + thread
                                        ] * T.exp2(stats[row, n, head, 0] - peak[0])
                                    out[start[row], head, turn * THREADS + thread] = T.Cast(
                                        dtype, one[0] / total[0]
                                    )

    return merge
