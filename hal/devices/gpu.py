"""What CUDA and ROCm devices share: torch's HIP build goes by the name of torch.cuda too."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halyard.hal import cpuinfo
from halyard.hal.contract import CONTRACT_VERSION
from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import BackendUnavailableError, CapacityError
from halyard.hal.memory_advice import ask_for_huge_pages
from halyard.hal.memory_errors import is_out_of_memory
from halyard.hal.types import DeviceInfo, KVLayout, KVPool, MemoryInfo, Probe

__all__ = ["GpuDevice"]

log = logging.getLogger("halyard.devices")

_gpu: Any = torch.cuda  # its annotations differ between torch releases
_REGISTER_PORTABLE_MAPPED = 3  # every context sees it, and kernels may address it


class _GpuFetch:
    """A copy to pinned memory, and the event behind it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = _gpu.Event()
        self._event.record()

    def ready(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> Tensor:
        self._event.synchronize()
        return self._host


def keep_kernels_in_one_place() -> None:
    """Name the folder where Triton keeps compiled kernels: its own, unless another one is named.

    Inductor names one of its own when it first compiles or loads a kernel. What is compiled before
    went elsewhere then, and the next process, which does things in another order, compiled it again.
    """
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    os.environ.setdefault("TRITON_CACHE_DIR", str(home / ".triton" / "cache"))


class GpuDevice:
    """The first visible GPU (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES). Opened when constructed.

    All work goes to torch's current stream, but for moves beside a step.
    """

    contract_version = CONTRACT_VERSION
    info: DeviceInfo

    def __init__(self) -> None:
        probe = self.probe()
        if not probe.available or probe.info is None:
            raise BackendUnavailableError("; ".join(probe.reasons))
        keep_kernels_in_one_place()
        self.torch_device = torch.device("cuda", 0)
        try:
            _gpu.init()
            properties = _gpu.get_device_properties(0)
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            raise BackendUnavailableError(f"{probe.info.name} can't be opened: {told}") from error
        _gpu.set_device(0)
        self.info = replace(
            probe.info,
            name=properties.name,
            memory_bytes=properties.total_memory,
            num_cores=properties.multi_processor_count,
            arch=self.arch_of(properties),
        )
        self._graph_pool: Any = None  # one for all captured steps
        # The stream that they are captured on. Of each stream it is called on cuBLAS keeps 32 MiB.
        self._recording: Any = None
        self._registered: list[Tensor] = []  # kept until close: freed pages must not stay locked
        self._side: Any = None  # the stream of moves
        self._marked: Any = None  # an event before the last step's work
        self._closed = False

    @classmethod
    def probe(cls) -> Probe:
        """Which GPU is here, found without opening it."""
        raise NotImplementedError

    @staticmethod
    def arch_of(properties: object) -> str:
        """The architecture's name as DeviceInfo has it, from torch's device properties."""
        raise NotImplementedError

    def memory(self) -> MemoryInfo:
        free, total = _gpu.mem_get_info(0)
        # What torch's allocator holds but has given to nobody is free to this process.
        held = _gpu.memory_reserved(0) - _gpu.memory_allocated(0)
        return MemoryInfo(total=total, free=min(total, free + held))

    def allocate_kv(self, layout: KVLayout, num_blocks: int, *, host: bool) -> KVPool:
        size = num_blocks * layout.bytes_per_block
        free = cpuinfo.memory_available() if host else self.memory().free
        if size > free:
            raise CapacityError(self._too_large(num_blocks, size, free, host))
        shape = (layout.spec.num_layers, num_blocks, *layout.block_shape)
        dtype = torch_dtype(layout.dtype)
        if host:
            # A block lies in one piece, all layers of it: copy engines want large pieces.
            whole = torch.empty((num_blocks, shape[0], *shape[2:]), dtype=dtype)
            ask_for_huge_pages(whole.data_ptr(), size)
            whole.zero_()  # by many threads, where pinning would touch page after page
            self._pin(whole)
            return KVPool(layout, num_blocks, host, whole.transpose(0, 1))
        try:
            data = torch.empty(shape, dtype=dtype, device=self.torch_device)
        except torch.OutOfMemoryError as error:  # free, but not in one piece
            raise CapacityError(self._too_large(num_blocks, size, free, host)) from error
        return KVPool(layout, num_blocks, host, data)

    def capture(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        """`fn` runs once to warm up (compilers, workspaces) and once to be recorded."""
        current = _gpu.current_stream()
        if self._recording is None:
            self._recording = _gpu.Stream()
        stream = self._recording
        stream.wait_stream(current)
        with _gpu.stream(stream):
            fn()
        current.wait_stream(stream)
        _gpu.synchronize()
        if self._graph_pool is None:
            # Replays follow each other on one stream, so graphs may share what they need in between.
            self._graph_pool = _gpu.graph_pool_handle()
        graph = _gpu.CUDAGraph()
        try:
            with _gpu.graph(graph, pool=self._graph_pool, stream=stream):
                fn()
        except RuntimeError as error:  # something in it waits for the device, or can't be recorded
            short = _memory_error(error)
            self._free_generator()
            # A smaller step may be recorded, and this one later. Only torch's allocator can grow while
            # something is recorded: another's failure says nothing about the memory that is left.
            if isinstance(short, torch.OutOfMemoryError):
                self._graph_pool = None
                raise short from None
            log.warning("a step could not be captured: %s", str(short or error).splitlines()[0])
            self._graph_pool = None  # torch holds this one for recording still
            return None
        replay: Callable[[], None] = graph.replay
        return replay

    def unheld(self, tensor: Tensor) -> Tensor:
        return torch.as_tensor(_Place(tensor), device=self.torch_device).view(tensor.dtype)

    def _free_generator(self) -> None:
        """After a recording that broke off torch's generator of the device would go on refusing: it takes
        the recording to be under way. Whoever draws numbers there next, us or not, would get an error."""
        generator = _gpu.default_generators[self.torch_device.index]
        try:
            fresh = torch.Generator(self.torch_device)
            fresh.manual_seed(generator.initial_seed())
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
        except RuntimeError as error:
            log.warning("torch draws no numbers on this device any more: %s", error)

    def fetch(self, tensor: Tensor) -> _GpuFetch:
        return _GpuFetch(tensor)

    def mark(self) -> None:
        self._marked = _gpu.Event()
        self._marked.record()

    @contextmanager
    def beside(self, step: bool) -> Iterator[None]:
        if self._side is None:
            self._side = _gpu.Stream()
        current = _gpu.current_stream()
        if step and self._marked is not None:
            self._side.wait_event(self._marked)
        else:
            self._side.wait_stream(current)
        try:
            with _gpu.stream(self._side):
                yield
        finally:
            current.wait_stream(self._side)

    def empty_cache(self) -> None:
        self._graph_pool = None  # torch takes no pool again whose recordings are all gone
        _gpu.synchronize()
        _gpu.empty_cache()

    def synchronize(self) -> None:
        _gpu.synchronize()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        _gpu.synchronize()
        for data in self._registered:
            _gpu.cudart().cudaHostUnregister(data.data_ptr())
        self._registered.clear()
        self._graph_pool = self._side = self._marked = self._recording = None
        _gpu.empty_cache()

    def _pin(self, data: Tensor) -> None:
        """Lock the pages in place so that the GPU reads and writes them itself.

        Registered rather than allocated pinned: torch's pinned allocator rounds up to a power of
        two, which for a swap tier of many GiB may double it.
        """
        size = data.numel() * data.element_size()
        if not size:
            return
        runtime = _gpu.cudart()
        status = runtime.cudaHostRegister(data.data_ptr(), size, _REGISTER_PORTABLE_MAPPED)
        if int(status):
            log.warning(
                "%.1f GiB of host memory could not be pinned (error %d): swaps will be slow; raise "
                "the locked-memory limit (ulimit -l)", size / 2**30, int(status),
            )  # fmt: skip
            return
        self._registered.append(data)

    def _too_large(self, num_blocks: int, size: int, free: int, host: bool) -> str:
        where = "host" if host else "GPU"
        advice = "--host-kv-blocks" if host else "--kv-blocks"
        return (
            f"{num_blocks} KV blocks need {size / 2**30:.1f} GiB of {where} memory, but "
            f"{free / 2**30:.1f} GiB are free: ask for fewer ({advice}) or a shorter "
            "--max-model-len"
        )


class _Place:
    """Where a contiguous tensor lies, in the words that array libraries hand memory over with: who makes
    a tensor of it holds this, not the memory."""

    def __init__(self, tensor: Tensor) -> None:
        integers = {1: "|i1", 2: "<i2", 4: "<i4", 8: "<i8"}  # they have none for bfloat16
        self.__cuda_array_interface__ = {
            "version": 2,
            "shape": tuple(tensor.shape),
            "typestr": integers[tensor.element_size()],
            "data": (tensor.data_ptr(), False),
        }


def _memory_error(error: BaseException) -> BaseException | None:
    """What says that memory ran out: the error, or what happened before it while recording."""
    cause: BaseException | None = error
    while cause is not None and not is_out_of_memory(cause):
        cause = cause.__context__
    return cause
