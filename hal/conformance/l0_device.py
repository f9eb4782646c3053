"""L0: the device tells the truth about itself, allocates, orders and replays."""

from __future__ import annotations

import torch

from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.hal.errors import CapacityError
from halyard.hal.registry import Axis, load_part, probe_device, probe_part
from halyard.hal.types import DeviceInfo, KVSpec

__all__ = ["cases"]


def cases(backend: BackendUnderTest) -> list[Case]:
    """Cases of any backend."""
    found = [
        Case("L0", "probe", _probe),
        Case("L0", "open_and_close", _open_and_close),
        Case("L0", "memory", _memory),
        Case("L0", "too_much_memory_is_one_clear_line", _too_much),
        Case("L0", "tensors_live_on_the_device", _tensors),
        Case("L0", "capture", _capture),
    ]
    for dtype in backend.claimed_dtypes():
        found += [
            Case("L0", "pool", _pool, dtype),
            Case("L0", "host_pool", _pool, dtype, params={"host": True}),
        ]
    return found


def _probe(context: CaseContext) -> None:
    row, require = context.backend.row, context.require
    probe = probe_device(row.device)
    info = probe.info
    require(probe.available and info is not None, "the device's probe says it isn't here")
    if info is None:
        return
    require(info.kind == row.device, f"the device calls itself {info.kind!r}")
    require(bool(info.vendor and info.arch and info.name), "vendor, arch or name is empty")
    require(info.memory_bytes > 0, f"memory_bytes is {info.memory_bytes}")
    require(bool(info.native_dtypes), "it names no dtype with hardware arithmetic")
    axes: tuple[tuple[Axis, str], ...] = (("kernels", row.kernels), ("graphs", row.graph))
    for axis, name in axes:
        found = probe_part(axis, name, info)
        require(found.available == (not found.reasons), f"{axis}: available but with reasons")
        part = load_part(axis, name)
        require(part.name == name, f"{axis} part {name!r} calls itself {part.name!r}")
    other = probe_part("kernels", row.kernels, _somewhere_else(info.kind))
    require(other.available or bool(other.reasons), "the kernels give no reason on another device")


def _somewhere_else(kind: str) -> DeviceInfo:
    return DeviceInfo("elsewhere" if kind != "elsewhere" else "other", "none", "none", "none", 1, 1)


def _open_and_close(context: CaseContext) -> None:
    device = load_part("devices", context.backend.row.device)()
    device.synchronize()
    device.close()
    device.close()  # idempotent


def _memory(context: CaseContext) -> None:
    memory = context.device.memory()
    context.require(0 < memory.free <= memory.total, f"memory is {memory}")
    context.notes["memory_bytes"] = memory.total


def _too_much(context: CaseContext) -> None:
    dtype = (context.backend.claimed_dtypes() or ("float32",))[0]
    layout = context.kernels.layout(KVSpec(32, 8, 128, dtype, 16))
    # A kernel set may store almost nothing (null): ask by bytes, for a thousand times what is there.
    blocks = 1000 * context.device.memory().total // layout.bytes_per_block
    try:
        context.device.allocate_kv(layout, blocks, host=False)
    except CapacityError as error:
        context.require("\n" not in str(error), "the error is longer than a line")
    else:
        context.require(False, f"a pool of {blocks} blocks was allocated")


def _tensors(context: CaseContext) -> None:
    tensor = torch.arange(12.0).to(context.device.torch_device)
    context.require((tensor * 2).cpu().tolist() == [2.0 * i for i in range(12)], "2 * x is wrong")


def _pool(context: CaseContext) -> None:
    host = context.case.params.get("host", False)
    layout = context.kernels.layout(KVSpec(3, 2, 64, context.dtype, 16))
    pool = context.device.allocate_kv(layout, 5, host=host)
    require = context.require
    require(tuple(pool.data.shape) == (3, 5, *layout.block_shape), f"shape {pool.data.shape}")
    require(str(pool.data.dtype) == f"torch.{context.dtype}", f"dtype {pool.data.dtype}")
    require(pool.num_blocks == 5 and pool.host == host, "num_blocks or host is wrong")
    require(pool.data[1, 2].is_contiguous(), "a block of a layer is not in one piece")
    require(host or pool.data.is_contiguous(), "the device's pool is not contiguous")
    where = "cpu" if host else context.device.torch_device.type
    require(pool.data.device.type == where, f"the pool lives on {pool.data.device}")
    if host and context.device.torch_device.type != "cpu":
        context.notes["pinned"] = pool.data.is_pinned()


def _capture(context: CaseContext) -> None:
    source = torch.zeros(8, device=context.device.torch_device)
    target = torch.zeros_like(source)

    def work() -> None:
        target.copy_(source * 3 + 1)

    replay = context.device.capture(work)
    context.notes["captures"] = replay is not None
    if replay is None:
        return
    for value in (1.0, 5.0):
        source.fill_(value)
        replay()
        context.device.synchronize()
        context.require(target.cpu().tolist() == [value * 3 + 1] * 8, "a replay gives old results")
