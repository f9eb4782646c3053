"""The Triton kernel set: contract calls become launches. CUDA and ROCm share every line.

A block of one layer is stored as [2, kv_heads, block_size, head_dim]: the keys (values) of one head
lie side by side, so that a program, which works on one head, reads a block as one contiguous piece
(4 KiB at 16 tokens of 128 bf16) whatever the number of heads.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from halyard.hal.contract import CONTRACT_VERSION, Device
from halyard.hal.dtypes import dtype_name
from halyard.hal.errors import BackendUnavailableError
from halyard.hal.kernels.triton.draw_launch import DrawLauncher
from halyard.hal.kernels.triton.launch import AttentionLauncher
from halyard.hal.kernels.triton.tiles import family
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

if TYPE_CHECKING:
    from halyard.hal.kernels.triton.staging import StagedSwap

__all__ = ["SwapWay", "TritonKernels"]

SwapWay = Literal["auto", "kernel", "staged"]

# Up to here the kernel is done sooner than a staged swap (benchmarks/gpu_swap.py).
_FEW_BYTES = 8 << 20


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


class TritonKernels:
    """Paged attention on the GPU.

    Args:
        swap: "kernel" reads and writes pinned host memory in place; "staged" has the copy engines
            move whole blocks from and to a buffer, where host blocks are whole; "auto": staged, but
            for a few blocks.
        num_splits: programs a decode row's keys are split over; None: by shape and device.
    """

    contract_version = CONTRACT_VERSION
    name = "triton"
    writes_alone = True  # see WritingKernels
    reads_shared_rows = True  # attend makes use of StepBatch.shared
    takes_empty_rows = True  # attend takes rows without tokens, and tokens without a row
    capabilities = Capabilities(
        dtypes=("float32", "float16", "bfloat16"),
        kv_dtypes=("float32", "float16", "bfloat16"),
        block_sizes=(16, 32, 64, 128),
        head_dims=tuple(range(16, 257, 8)),
        max_gqa_ratio=None,
    )

    def __init__(
        self, device: Device, swap: SwapWay = "auto", num_splits: int | None = None
    ) -> None:
        probe = self.probe(device.info)
        if not probe.available:
            raise BackendUnavailableError("; ".join(probe.reasons))
        self.device = device
        self.swap = swap
        self.launcher = AttentionLauncher(device, num_splits)
        self._moves = importlib.import_module("halyard.hal.kernels.triton.moves")
        self._staging: StagedSwap | None = None
        self.drawing = DrawLauncher(device)

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        reasons = []
        versions = {}
        if find_spec("triton") is None:
            reasons.append("the triton kernels need triton: pip install triton")
        else:
            try:
                versions["triton"] = version("triton")
            except PackageNotFoundError:  # a build of one's own without metadata
                versions["triton"] = "unknown"
        if device.kind in ("cuda", "rocm"):
            try:
                family(device.arch)
            except BackendUnavailableError as error:
                reasons.append(str(error))
        elif device.kind != "cpu":
            reasons.append(f"the triton kernels run on cuda and rocm, not on {device.kind}")
        elif not _interpreting():
            reasons.append(
                "the triton kernels run on cuda and rocm; on the cpu only in Triton's interpreter, "
                "for tests: set TRITON_INTERPRET=1"
            )
        return Probe(not reasons, tuple(reasons), versions=versions)

    def layout(self, spec: KVSpec) -> KVLayout:
        return KVLayout(spec, (2, spec.num_kv_heads, spec.block_size, spec.head_dim), spec.dtype)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        if q.dtype != pool.data.dtype:
            held = pool.layout.dtype
            raise AssertionError(f"queries are {dtype_name(q.dtype)}, the KV pool is {held}")
        self.write(k, v, pool, layer, batch)
        q = q if q.stride(-1) == 1 else q.contiguous()
        return self.launcher.attend(q, pool.data[layer.index], layer, batch)

    def write(
        self, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> None:
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        self.launcher.write(k, v, pool.data[layer.index], batch.slot_mapping)

    def draw(
        self, logits: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.drawing.draw(logits, rows, columns)

    def change(
        self,
        logits: Tensor,
        rows: Tensor,
        penalties: Tensor,
        slots: Tensor,
        counts: tuple[Tensor, Tensor] | None,
        masks: Tensor,
        allowed: Tensor | None,
    ) -> Tensor:
        return self.drawing.change(logits, rows, penalties, slots, counts, masks, allowed)

    def compiling(self) -> AbstractContextManager[None]:
        """As CompilingKernels.compiling."""
        if _interpreting():
            return nullcontext()
        ahead: Any = importlib.import_module("halyard.hal.kernels.triton.ahead")
        context: AbstractContextManager[None] = ahead.compiling_only()
        return context

    def copy_blocks(self, pool: KVPool, moves: Sequence[BlockMove]) -> None:
        self._moves.gather_moves(pool, pool, moves, pool.data.device)

    def swap_out(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        staged = self._staged_swap(pool, host, len(moves))
        if staged is not None:
            staged.swap_out(pool, host, moves)
        else:
            self._swap(pool, host, moves, pool.data.device)

    def swap_in(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        staged = self._staged_swap(pool, host, len(moves))
        if staged is not None:
            staged.swap_in(pool, host, [(move.target, move.source) for move in moves])
        else:
            self._swap(host, pool, moves, pool.data.device)

    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        self._settle(pool)
        index = torch.tensor(list(blocks), dtype=torch.int64, device=pool.data.device)
        chosen = pool.data.index_select(1, index)  # [layers, blocks, 2, kv_heads, size, dim]
        return chosen.permute(2, 0, 1, 4, 3, 5).contiguous().cpu()

    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        self._settle(pool)
        index = torch.tensor(list(blocks), dtype=torch.int64, device=pool.data.device)
        chosen = data.to(pool.data.device).permute(1, 2, 0, 4, 3, 5).contiguous()
        pool.data.index_copy_(1, index, chosen)

    def _staged_swap(self, pool: KVPool, host: KVPool, moves: int) -> StagedSwap | None:
        """None: the kernel's turn. Host blocks aren't whole, or so few that it is done sooner."""
        if self.swap == "kernel" or pool.data.device.type != "cuda":
            return None
        if self.swap == "auto" and moves * pool.layout.bytes_per_block <= _FEW_BYTES:
            return None
        staging = importlib.import_module("halyard.hal.kernels.triton.staging")
        if not staging.StagedSwap.takes(host):
            return None
        if self._staging is None:
            self._staging = staging.StagedSwap(pool.data.device)
        return self._staging

    def _swap(
        self, source: KVPool, target: KVPool, moves: Sequence[BlockMove], device: torch.device
    ) -> None:
        if self._in_reach(source) and self._in_reach(target):
            self._moves.gather_moves(source, target, moves, device)
        else:
            self._moves.index_moves(source, target, moves)

    def _settle(self, pool: KVPool) -> None:
        """Before the host touches a host pool itself: swaps may still be on their way."""
        if pool.host:
            self.device.synchronize()

    @staticmethod
    def _in_reach(pool: KVPool) -> Any:
        """Whether a kernel can address the pool: device memory, or pinned host memory."""
        return not pool.host or pool.data.is_pinned() or _interpreting()
