"""Block moves as TIR: whole blocks, all layers, from one pool to another, bit for bit.

Both pools are seen as [layers, blocks, words] of four bytes: a move copies bits, and one function
serves every dtype of a size. Nothing lies between source and target, where torch's gather and
scatter write the blocks to a temporary first.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T  # noqa: N812 - TVM's own convention

from halyard.hal.kernels.tvm.shape import LANES, MoveShape

__all__ = ["cpu_move", "gpu_move"]

THREADS = 128  # of a thread block


def cpu_move(shape: MoveShape, parallel: bool) -> Any:
    """`move(source, target, pairs)`; pairs is [moves, 2] int64.

    Args:
        parallel: spread moves and layers over TVM's threads.
    """
    words = shape.words
    each = T.parallel if parallel else T.serial

    @T.prim_func(s_tir=True)
    def move(source_handle: T.handle, target_handle: T.handle, pairs_handle: T.handle) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "move", "tirx.noalias": True})
        layers, moves = T.int32(), T.int32()
        source_blocks, target_blocks = T.int64(), T.int64()
        source = T.match_buffer(source_handle, (layers, source_blocks, words), "int32")
        target = T.match_buffer(target_handle, (layers, target_blocks, words), "int32")
        pairs = T.match_buffer(pairs_handle, (moves, 2), "int64")
        for part in each(layers * moves):
            with T.sblock("move"):
                T.reads()
                T.writes()
                layer: T.let[T.int32] = part // moves
                here: T.let[T.int64] = pairs[part % moves, 0]
                there: T.let[T.int64] = pairs[part % moves, 1]
                for vector in T.serial(words // LANES):
                    for lane in T.vectorized(LANES):
                        target[layer, there, vector * LANES + lane] = source[
                            layer, here, vector * LANES + lane
                        ]

    return move


def gpu_move(shape: MoveShape, index: str) -> Any:
    """As `cpu_move`, for a grid of moves by layers.

    Args:
        index: the dtype of pairs and of places in the pools.
    """
    words = shape.words

    @T.prim_func(s_tir=True)
    def move(source_handle: T.handle, target_handle: T.handle, pairs_handle: T.handle) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "move", "tirx.noalias": True})
        layers, moves = T.int32(), T.int32()
        source_blocks, target_blocks = T.int32(), T.int32()
        source = T.match_buffer(source_handle, (layers, source_blocks, words), "int32")
        target = T.match_buffer(target_handle, (layers, target_blocks, words), "int32")
        pairs = T.match_buffer(pairs_handle, (moves, 2), index)
        for number in T.thread_binding(moves, thread="blockIdx.x"):
            for layer in T.thread_binding(layers, thread="blockIdx.y"):
                for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                    with T.sblock("move"):
                        T.reads()
                        T.writes()
                        for turn in T.serial((words + (THREADS - 1)) // THREADS):
                            if turn * THREADS + thread < words:
                                target[
                                    T.Cast(index, layer),
                                    pairs[number, 1],
                                    turn * THREADS + thread,
                                ] = source[
                                    T.Cast(index, layer),
                                    pairs[number, 0],
                                    turn * THREADS + thread,
                                ]

    return move
