"""The contract. A backend is a device, a kernel set and a graph compiler that honour this page.

Lifetime   open device -> make kernels(device) -> allocate pools once -> steps -> device.close().
Ordering   All calls of one device are ordered as issued (one stream, or none): a move is seen by
           the next attend, an attend's KV writes by the next move. Callers synchronise only to read
           results on the host.
Memory     Pools are allocated once. No call below keeps a reference to a tensor it was given
           except the pool, and none allocates KV.
Errors     What a caller can cause raises a HalyardError; a broken invariant raises at once.
           Nothing is retried or swallowed.
Probing    `probe()` never opens a context on the hardware, never raises for a missing library and
           returns every reason at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from halyard.hal.types import (
    AttentionLayer,
    BlockMove,
    Capabilities,
    DeviceInfo,
    KVLayout,
    KVPool,
    KVSpec,
    MemoryInfo,
    Probe,
    StepBatch,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx

__all__ = [
    "CONTRACT_VERSION",
    "ChangingKernels",
    "CompilingKernels",
    "CopyingDevice",
    "Device",
    "DrawingKernels",
    "Executable",
    "Fetch",
    "GraphCompiler",
    "MaskingKernels",
    "OverlappingDevice",
    "PagedKernels",
    "RecordingDevice",
    "ThriftyDevice",
    "WritingKernels",
]

CONTRACT_VERSION = (1, 5)  # a part with another major number is refused by the registry


@runtime_checkable
class Device(Protocol):
    """One opened piece of hardware. Entry-point group `halyard.devices`; constructed as `cls()`."""

    contract_version: tuple[int, int]
    info: DeviceInfo
    torch_device: torch.device  # where tensors for this device live

    @classmethod
    def probe(cls) -> Probe:
        """Is such hardware here? `info` is filled when it is."""

    def memory(self) -> MemoryInfo:
        """Bytes that this process may use, and how many are free now."""

    def allocate_kv(self, layout: KVLayout, num_blocks: int, *, host: bool) -> KVPool:
        """Allocate a pool; contents are undefined. Raises CapacityError if it doesn't fit."""

    def capture(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        """Record `fn`'s device work and return its replay, or None where that isn't possible."""

    def synchronize(self) -> None:
        """Wait until all issued work is done."""

    def close(self) -> None:
        """Free everything. Idempotent; no other method may be called afterwards."""


class Fetch(Protocol):
    """A tensor on its way to the host."""

    def ready(self) -> bool:
        """Would `wait` return at once?"""

    def wait(self) -> Tensor:
        """The tensor on the host, once what was issued before the fetch is done."""


@runtime_checkable
class OverlappingDevice(Protocol):
    """What a Device may offer besides (1.1): it works on while the host does something else.

    Then the engine issues a step before it knows the tokens of the one before.
    """

    def fetch(self, tensor: Tensor) -> Fetch:
        """Begin to copy a tensor to the host, behind all work issued so far. Doesn't wait."""


@runtime_checkable
class CopyingDevice(Protocol):
    """What a Device may offer besides (1.1): blocks move while it computes.

    The caller answers for it that they are none of those that the step under way reads or writes.
    """

    def mark(self) -> None:
        """The work of a step is issued from here on."""

    def beside(self, step: bool) -> AbstractContextManager[None]:
        """Work issued within comes before all that is issued later, and after all that was issued
        earlier; with `step`, only after what was issued before the last mark."""


@runtime_checkable
class RecordingDevice(Protocol):
    """What a Device may offer besides (1.5), where recordings share the memory they work in."""

    def unheld(self, tensor: Tensor) -> Tensor:
        """What a recording leaves in `tensor`, for as long as no other is replayed: the memory is not
        held for it, so that later recordings work in it too. The caller drops `tensor`."""


@runtime_checkable
class ThriftyDevice(Protocol):
    """What a Device may offer besides (1.2), where its allocator keeps memory that was freed."""

    def empty_cache(self) -> None:
        """Give what nothing uses back, so that other processes can have it."""


@runtime_checkable
class PagedKernels(Protocol):
    """Paged attention and block moves. Group `halyard.kernels`; constructed as `cls(device)`."""

    contract_version: tuple[int, int]
    name: str
    capabilities: Capabilities

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        """Can these kernels run on that device here?"""

    def layout(self, spec: KVSpec) -> KVLayout:
        """The physical layout these kernels want for `spec`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> Tensor:
        """Write the new keys and values to their slots, then attend causally over the sequences.

        All are written before any row attends: a row may read blocks that another one fills in this
        very call (prompts that come together and begin alike). Prefill, chunked prefill, decode and
        any mix are this one call. Tokens whose slot is -1 are not written. Query t of a row attends
        to positions 0 .. its own, narrowed by layer.window.

        Args:
            q: [tokens, num_heads, head_dim] activations dtype, last dim contiguous.
            k, v: [tokens, num_kv_heads, head_dim] as q.
        Returns:
            [tokens, num_heads, head_dim] in q's dtype, contiguous.
        """

    def copy_blocks(self, pool: KVPool, moves: Sequence[BlockMove]) -> None:
        """Copy whole blocks within a pool. No block is both a source and a target in one call."""

    def swap_out(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        """Copy device blocks (sources) to host blocks (targets), bit for bit."""

    def swap_in(self, pool: KVPool, host: KVPool, moves: Sequence[BlockMove]) -> None:
        """Copy host blocks (sources) to device blocks (targets), bit for bit."""

    def read_blocks(self, pool: KVPool, blocks: Sequence[int]) -> Tensor:
        """Canonical form [2, layers, blocks, block_size, kv_heads, head_dim] on the host, kv dtype."""

    def write_blocks(self, pool: KVPool, blocks: Sequence[int], data: Tensor) -> None:
        """The inverse of read_blocks."""


@runtime_checkable
class DrawingKernels(Protocol):
    """What PagedKernels may offer besides (1.1): tokens are drawn by kernels of the device."""

    def draw(
        self, logits: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one token for each of n rows. Never waits for the device.

        Kept are the top_k most likely tokens, of these the fewest that hold top_p of their weight,
        of these those that are min_p times as likely as the first; equally likely ones stay
        together. A token is drawn by inverse distribution in the order of the vocabulary.

        Args:
            logits: [any, vocab] fp32, fp16 or bf16, last dim contiguous.
            rows: [n] int64, the logits' rows; None: the first n, as many as columns has or all.
            columns: [5, n] fp32: temperature (0: greedy), top_p, min_p, top_k (0: all), a number in
                [0, 1); None: all rows are greedy, the first of the largest.
        Returns:
            tokens [n] int64 below vocab; bad [n] bool: the row's logits were not numbers; codes [n]
            int64: 2 x token + bad, both in one piece for the host.
        """


@runtime_checkable
class ChangingKernels(Protocol):
    """What DrawingKernels may offer besides (1.5): penalties and grammars change logits in one pass."""

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
        """Logits [n, vocab] fp32 of n rows, to draw from. Never waits for the device.

        Of a token that was seen a positive logit is divided by the repetition penalty, another is
        multiplied by it; subtracted are the frequency penalty for each time that it was answered, and
        the presence penalty if it was; then forbidden tokens get -inf, numbers that are none stay.

        Args:
            logits: [any, vocab] fp32, fp16 or bf16, last dim contiguous.
            rows: [n] int64, the logits' rows.
            penalties: [3, n] fp32: repetition, frequency, presence.
            slots: [n] int64, the row's line of both counts; -1: it has no penalties.
            counts: seen [any, vocab] bool and times answered [any, vocab] fp32; None: no row has a slot.
            masks: [n] int64, the row's line of `allowed`; -1: it may have all tokens.
            allowed: [any, words] int32, a bit a token, lowest first; None: no row has a mask.
        """


@runtime_checkable
class GreedyKernels(Protocol):
    """What PagedKernels may offer besides: a greedy row's token without a copy of its logits."""

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's first largest number, NaN being larger than all.

        Args:
            logits: [rows, vocab] fp32 or bf16, last dim contiguous; on the host.
        Returns:
            where [rows] int64, and the numbers [rows] fp32.
        """


@runtime_checkable
class MaskingKernels(Protocol):
    """What PagedKernels may offer besides: tokens that grammars forbid are barred in one pass."""

    def bar(self, logits: Tensor, allowed: Tensor, places: Tensor | None) -> None:
        """Add -inf to the logits of forbidden tokens, in place.

        Args:
            logits: [any, vocab] fp32, last dim contiguous.
            allowed: [n, bytes] uint8, contiguous, a bit a token, lowest first; on the host.
            places: [n] int64, different rows of the logits, on the host; None: the first n.
        """


class WritingKernels(Protocol):
    """What PagedKernels may offer besides (1.4): keys and values are written without an attention.

    Then, in the last layer, only the tokens whose logits are wanted attend. In 1.3 the method was
    offer enough; kernels from then, or with a `write` of another meaning, just do without.
    """

    writes_alone: bool  # True is the offer

    def write(
        self, k: Tensor, v: Tensor, pool: KVPool, layer: AttentionLayer, batch: StepBatch
    ) -> None:
        """What `attend` does first: keys and values to their slots, tokens without one left out."""


@runtime_checkable
class CompilingKernels(Protocol):
    """What PagedKernels may offer besides: kernels are compiled before anything waits for them."""

    def compiling(self) -> AbstractContextManager[None]:
        """Within it calls compile the kernels they would launch, and launch none of them: what they
        return is anything of the right shape. On leaving these kernels are compiled."""


Executable = Callable[..., "tuple[Tensor, ...]"]  # positional tensors in, tuple of tensors out


@runtime_checkable
class GraphCompiler(Protocol):
    """Compiles what lies between two attentions. Group `halyard.graphs`; constructed as `cls()`."""

    contract_version: tuple[int, int]
    name: str

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        """Can it compile for that device here?"""

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        """Names of the passes (compiler/pipeline.py) that it wants before segments are cut."""

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        """Compile one segment. `inputs` are fake example tensors with symbolic token counts; weights
        are inputs too, so identical segments share one executable."""

    def save(self, executable: Executable, directory: Path) -> bool:
        """Write an executable that this compiler made; False if there is nothing worth keeping."""

    def load(self, directory: Path, device: DeviceInfo) -> Executable:
        """Read back what `save` wrote. Raises any error on damage; the cache then compiles anew."""
