"""The CPU's kernel set: contract calls become one C call each. See attention.cpp for the layout."""

from __future__ import annotations

import ctypes
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

_POINTERS = ("q", "k", "v", "out", "pool", "slot_mapping", "block_tables", "seq_lens",
             "query_start", "sinks")  # fmt: skip
_NUMBERS = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "num_tokens", "num_rows",
            "max_blocks", "num_heads", "num_kv_heads", "head_dim", "block", "window")  # fmt: skip


class _Args(ctypes.Structure):
    """Mirrors `struct Args` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int64),
    )


class _MaskArgs(ctypes.Structure):
    """Mirrors `struct MaskArgs` of operators.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "allowed", "places")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride", "bytes")),
    )


def _threads(batch: StepBatch, layer: AttentionLayer) -> int:
    work = batch.num_tokens * batch.max_seq_len * layer.num_heads * layer.head_dim
    return num_threads() if work >= MIN_PARALLEL_WORK else 1


class NativeKernels:
    """Vectorised C++, built for this CPU's instruction set at first use."""

    contract_version = CONTRACT_VERSION
    name = "native"
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
        if self._library.halyard_args_size() != ctypes.sizeof(_Args):
            raise AssertionError("the native library was built from another source")
        self._attend = {
            torch.float32: self._library.halyard_attend_float32,
            torch.bfloat16: self._library.halyard_attend_bfloat16,
        }

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
        out = torch.empty(q.shape, dtype=q.dtype)
        data = pool.data
        # Queries are read as packed vectors; a transposed view would be read wrongly.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if q.dtype != data.dtype:
            raise AssertionError(f"queries are {q.dtype}, the KV pool is {data.dtype}")
        sinks = layer.sinks.float().contiguous() if layer.sinks is not None else None
        args = _Args(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
            data.data_ptr() + layer.index * data.stride(0) * data.element_size(),
            batch.slot_mapping.data_ptr(), batch.block_tables.data_ptr(),
            batch.seq_lens.data_ptr(), batch.query_start.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            batch.num_tokens, batch.num_rows, batch.block_tables.shape[1],
            layer.num_heads, layer.num_kv_heads, layer.head_dim, pool.layout.spec.block_size,
            layer.window, layer.scale, layer.softcap, _threads(batch, layer),
        )  # fmt: skip
        self._attend[q.dtype](ctypes.byref(args))
        return out

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
