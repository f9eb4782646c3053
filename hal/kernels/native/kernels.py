"""The CPU's kernel set: contract calls become one C call each. See attention.cpp for the layout."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from halyard.hal.contract import CONTRACT_VERSION, Device
from halyard.hal.kernels.native.library import (
    MIN_PARALLEL_WORK,
    best_isa,
    find_compiler,
    load_library,
    num_threads,
    supported_isas,
)
from halyard.hal.types import (
    AttentionLayer,
    BlockMove,
    Capabilities,
    DeviceInfo,
    KVLayout,
    KVPool,
    KVSpec,
    Probe,
    StepBatch,
)

__all__ = ["NativeKernels"]

# `struct Args` of attention.cpp: ten addresses; strides, counts and shapes; scale, softcap; threads.
# One call that packs numbers takes a quarter of the time of a ctypes structure with as many fields,
# and between two segments that stream weights through the caches every call is a cold one.
_ARGS = struct.Struct("10P14q2fq")


class _MaskArgs(ctypes.Structure):
    """Mirrors `struct MaskArgs` of operators.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "allowed", "places")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride", "bytes")),
    )


def _addresses(batch: StepBatch) -> tuple[int, ...]:
    return (
        batch.slot_mapping.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.seq_lens.data_ptr(),
        batch.query_start.data_ptr(),
    )


class NativeKernels:
    """Vectorised C++, built for this CPU's instruction set at first use."""

    contract_version = CONTRACT_VERSION
    name = "native"
    writes_alone = True  # see WritingKernels
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16"),
        kv_dtypes=("float32", "bfloat16"),
        block_sizes=(16, 32, 48, 64, 96, 128),
        head_dims=tuple(range(16, 513, 16)),
        max_gqa_ratio=None,
    )

    def __init__(self, device: Device, isa: str | None = None) -> None:
        self.device = device
        self.isa = isa or best_isa(device.info.features)
        self._library = load_library(self.isa)
        if self._library.halyard_args_size() != _ARGS.size:
            raise AssertionError("the native library was built from another source")
        self._attend = {
            torch.float32: self._library.halyard_attend_float32,
            torch.bfloat16: self._library.halyard_attend_bfloat16,
        }
        self._largest = {
            torch.float32: self._library.halyard_largest_float32,
            torch.bfloat16: self._library.halyard_largest_bfloat16,
        }
        # Of the last call: a step's layers have these in common.
        self._batch: tuple[StepBatch | None, tuple[int, ...]] = (None, ())
        self._data: tuple[Tensor | None, int, int] = (None, 0, 0)

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        reasons = []
        if device.kind != "cpu":
            reasons.append(f"the native kernels run on the cpu, not on {device.kind}")
        if find_compiler() is None:
            reasons.append("the native kernels need a C++ compiler: apt install g++")
        return Probe(
            not reasons, tuple(reasons), versions={"isa": supported_isas(device.features)[0]}
        )

    def layout(self, spec: KVSpec) -> KVLayout:
        shape = (2, spec.num_kv_heads, spec.head_dim * spec.block_size)
        return KVLayout(spec, shape, spec.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        data, dtype = pool.data, q.dtype
        if dtype != data.dtype:
            raise AssertionError(f"queries are {dtype}, the KV pool is {data.dtype}")
        q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
        if q_strides[2] != 1 or k_strides[2] != 1 or v_strides[2] != 1:
            # Queries are read as packed vectors; a transposed view would be read wrongly.
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
        if self._batch[0] is not batch:
            self._batch = (batch, _addresses(batch))
        if self._data[0] is not data:
            self._data = (data, data.data_ptr(), data.stride(0) * data.element_size())
        _, first, layer_bytes = self._data
        num_heads, head_dim, sinks = layer.num_heads, layer.head_dim, layer.sinks
        if sinks is not None:
            sinks = sinks.float().contiguous()
        work = batch.num_tokens * batch.max_seq_len * num_heads * head_dim
        out = torch.empty(q.shape, dtype=dtype)
        args = _ARGS.pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
            first + layer.index * layer_bytes,
            *self._batch[1],
            0 if sinks is None else sinks.data_ptr(),
            q_strides[0], q_strides[1], k_strides[0], k_strides[1], v_strides[0], v_strides[1],
            batch.num_tokens, batch.num_rows, batch.block_tables.shape[1],
            num_heads, layer.num_kv_heads, head_dim, pool.layout.spec.block_size,
            layer.window, layer.scale, layer.softcap,
            num_threads() if work >= MIN_PARALLEL_WORK else 1,
        )  # fmt: skip
        self._attend[dtype](args)
        return out

    def write(
        self, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> None:
        data = pool.data
        if k.stride(2) != 1 or v.stride(2) != 1:
            k, v = k.contiguous(), v.contiguous()
        args = _ARGS.pack(  # a call without rows: nothing attends
            0, k.data_ptr(), v.data_ptr(), 0,
            data.data_ptr() + layer.index * data.stride(0) * data.element_size(),
            *_addresses(batch),
            0,
            0, 0, *k.stride()[:2], *v.stride()[:2],
            batch.num_tokens, 0, batch.block_tables.shape[1],
            layer.num_heads, layer.num_kv_heads, layer.head_dim, pool.layout.spec.block_size,
            layer.window, layer.scale, layer.softcap, num_threads(),
        )  # fmt: skip
        self._attend[data.dtype](args)

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, count = logits.shape
        where = torch.empty(rows, dtype=torch.int64)
        values = torch.empty(rows, dtype=torch.float32)
        self._largest[logits.dtype](
            ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(rows), ctypes.c_int64(count),
            ctypes.c_int64(logits.stride(0)), ctypes.c_void_p(where.data_ptr()),
            ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(num_threads()),
        )  # fmt: skip
        return where, values

    def bar(self, logits: Tensor, allowed: Tensor, places: Tensor | None) -> None:
        args = _MaskArgs(
            logits.data_ptr(), allowed.data_ptr(), None if places is None else places.data_ptr(),
            len(allowed), logits.shape[1], logits.stride(0), allowed.stride(0),
        )  # fmt: skip
        self._library.halyard_bar_float32(ctypes.byref(args))

    def copy_blocks(self, pool: KVPool, moves: Sequence[BlockMove]) -> None:
        self._move(pool, pool, moves)

    def swap_out(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self._move(pool, host, moves)

    def swap_in(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        self._move(host, pool, moves)

    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        spec = pool.layout.spec
        keys, values = self._split(pool.data[:, list(blocks)], pool)
        shape = (
            spec.num_layers, len(blocks), spec.block_size, spec.num_kv_heads, spec.head_dim
        )  # fmt: skip
        return torch.stack([keys.reshape(shape), values.reshape(shape)])

    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        chosen = torch.empty_like(pool.data[:, list(blocks)])
        keys, values = self._split(chosen, pool)
        keys.copy_(data[0].reshape(keys.shape))
        values.copy_(data[1].reshape(values.shape))
        pool.data[:, list(blocks)] = chosen

    def _move(self, source: KVPool, target: KVPool, moves: Sequence[BlockMove]) -> None:
        if not moves:
            return
        if not (source.data.is_contiguous() and target.data.is_contiguous()):
            raise AssertionError("the native kernels move blocks between contiguous pools")
        pairs = torch.tensor(moves, dtype=torch.int64)
        self._library.halyard_move_blocks(
            ctypes.c_void_p(source.data.data_ptr()),
            ctypes.c_void_p(target.data.data_ptr()),
            ctypes.c_int64(source.layout.spec.num_layers),
            ctypes.c_int64(source.num_blocks),
            ctypes.c_int64(target.num_blocks),
            ctypes.c_int64(source.data.stride(1) * source.data.element_size()),
            ctypes.c_void_p(pairs.data_ptr()),
            ctypes.c_int64(len(moves)),
            ctypes.c_int64(num_threads()),
        )

    @staticmethod
    def _split(chosen: Tensor, pool: KVPool) -> tuple[Tensor, Tensor]:
        """Views of keys and values in canonical order of elements, pairs still apart.

        `chosen` is [layers, blocks, 2, kv_heads, head_dim * block_size]. fp32 gives [layers, blocks,
        size, heads, dim] twice; bf16 keys [.., size, heads, dim / 2, 2] and values
        [.., size / 2, 2, heads, dim].
        """
        spec = pool.layout.spec
        lead, size, dim = chosen.shape[:2], spec.block_size, spec.head_dim
        keys, values = chosen[:, :, 0], chosen[:, :, 1]
        if spec.dtype == "float32":
            keys = keys.view(*lead, spec.num_kv_heads, dim, size).permute(0, 1, 4, 2, 3)
            values = values.view(*lead, spec.num_kv_heads, size, dim).permute(0, 1, 3, 2, 4)
            return keys, values
        keys = keys.view(*lead, spec.num_kv_heads, dim // 2, size, 2).permute(0, 1, 4, 2, 3, 5)
        values = values.view(*lead, spec.num_kv_heads, size // 2, dim, 2).permute(0, 1, 3, 5, 2, 4)
        return keys, values
