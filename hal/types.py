"""Frozen values that cross layers. No torch import here: the scheduler uses these too."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ITEM_SIZE",
    "AttentionLayer",
    "BlockMove",
    "Capabilities",
    "DType",
    "DeviceInfo",
    "KVLayout",
    "KVPool",
    "KVSpec",
    "MemoryInfo",
    "Probe",
    "Requirements",
    "SharedRows",
    "StepBatch",
    "WeightInfo",
]

DType = Literal["float32", "float16", "bfloat16"]

ITEM_SIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes an element


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What one piece of hardware is. Found without opening a context on it."""

    kind: str  # the device axis: "cpu", "cuda", "rocm" or an out-of-tree name
    vendor: str  # "intel", "amd", "nvidia", "arm", ...
    arch: str  # "x86_64", "aarch64", "sm_90", "gfx942", ...
    name: str  # marketing name
    memory_bytes: int  # what the process may use in all: respects cgroup limits
    num_cores: int  # cores (cpu) or multiprocessors (gpu) the process may use
    features: tuple[str, ...] = ()  # instruction sets and the like: "avx2", "avx512bf16", ...
    native_dtypes: tuple[DType, ...] = ("float32",)  # dtypes with hardware arithmetic
    bandwidth_bytes_per_second: float | None = None  # memory bandwidth if known or measured
    link_bytes_per_second: float | None = None  # host <-> device bandwidth if known or measured


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Device memory at one moment, in bytes."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a part can run here. `reasons` lists everything that is missing, never just the first."""

    available: bool
    reasons: tuple[str, ...] = ()  # one line each, with what mends it ("pip install ...")
    info: DeviceInfo | None = None  # devices only
    versions: dict[str, str] = field(default_factory=dict)  # library -> version, for reports


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What has to be stored: the logical shape of the KV cache of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    block_size: int = 16  # tokens a block

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * ITEM_SIZE[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a kernel set stores it: the physical shape of one block of one layer, keys and values.

    Only the kernel set that made the layout may interpret `block_shape`; everyone else moves whole
    blocks, or reads and writes the canonical form through the contract.
    """

    spec: KVSpec
    block_shape: tuple[int, ...]  # of one block in one layer, both K and V
    dtype: DType

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers."""
        return self.spec.num_layers * math.prod(self.block_shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class KVPool:
    """The physical blocks, allocated once. Nothing is allocated for KV at run time."""

    layout: KVLayout
    num_blocks: int
    host: bool  # True: host memory (pinned where that exists), the swap tier
    # [num_layers, num_blocks, *layout.block_shape] layout.dtype. A block of a layer lies in one piece;
    # a device pool is contiguous, a host pool may have its blocks outermost.
    data: Tensor


class BlockMove(NamedTuple):
    """One block, all layers, from a physical block id to another. Ids index their own pools."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What is constant about attention in one layer of a model."""

    index: int  # which layer of the pool
    num_heads: int  # query heads; num_heads % num_kv_heads == 0
    num_kv_heads: int
    head_dim: int
    scale: float  # positive; multiplies q.k before softcap and softmax
    window: int = 0  # 0: full; w > 0: query at position i sees keys at positions j with i - j < w
    softcap: float = 0.0  # 0: none; c > 0: scores become c * tanh(scores / c)
    sinks: Tensor | None = None  # [num_heads] extra logit in each head's softmax denominator

    def __post_init__(self) -> None:
        if not self.scale > 0:  # kernels take the largest score before they scale it
            raise ValueError(f"layer {self.index}: scale must be positive, got {self.scale}")


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows of a decode step whose first keys lie in the same blocks, in tiles of SharedRows.WIDTH.

    A tile's rows have the same first `tile_keys` keys, in whole blocks, and each has more of its own.
    Tiles are an even number: the second of a pair, if it is used, shares what the first one does.
    Kernels may read these once a tile or a pair, or take no notice.
    """

    WIDTH: ClassVar[int] = 16
    tile_rows: Tensor  # [tiles, WIDTH] int32 rows of the batch, -1 behind them; used pairs need not be first
    tile_keys: Tensor  # [tiles] int32, 0: the tile is not used
    row_keys: Tensor  # [num_rows] int32, keys that a tile reads for the row; 0: it is in none


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's packed tokens: prefill, chunked prefill and decode rows side by side.

    Row r owns tokens query_start[r] .. query_start[r + 1]; they are the last ones of its sequence,
    that is, positions seq_lens[r] - query_len .. seq_lens[r] - 1. Recorded decode steps are filled
    up with rows of one token without a slot and one key. Tensors live on the device.
    """

    num_tokens: int
    num_rows: int
    max_query_len: int
    max_seq_len: int
    positions: Tensor  # [num_tokens] int64
    slot_mapping: (
        Tensor  # [num_tokens] int64, physical slot = block * block_size + offset; -1: none
    )
    block_tables: Tensor  # [num_rows, max_blocks] int32 physical block ids; behind a row's own
    # ceil(seq_lens / block size) any ids of the pool: what these blocks hold must not matter
    seq_lens: Tensor  # [num_rows] int32, tokens with KV once this step has run
    query_start: Tensor  # [num_rows + 1] int32, cumulative
    shared: SharedRows | None = None  # of decode steps, where it pays; None: not looked for


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a model asks of a kernel set."""

    dtype: DType  # activations
    kv_dtype: DType
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: bool = False
    softcap: bool = False
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kernel set claims. A claim is tested by the conformance suite, cell by cell."""

    dtypes: tuple[DType, ...]
    kv_dtypes: tuple[DType, ...]
    block_sizes: tuple[int, ...]
    head_dims: tuple[int, ...] | None  # None: any
    max_gqa_ratio: int | None  # query heads per kv head; None: any
    window: bool = True
    softcap: bool = True
    sinks: bool = True

    def missing(self, need: Requirements) -> list[str]:
        """All the reasons why `need` isn't met; empty if it is."""
        reasons = []
        if need.dtype not in self.dtypes:
            reasons.append(f"dtype {need.dtype} (has {', '.join(self.dtypes)})")
        if need.kv_dtype not in self.kv_dtypes:
            reasons.append(f"kv dtype {need.kv_dtype} (has {', '.join(self.kv_dtypes)})")
        if need.block_size not in self.block_sizes:
            sizes = ", ".join(map(str, self.block_sizes))
            reasons.append(f"block size {need.block_size} (has {sizes})")
        if self.head_dims is not None and need.head_dim not in self.head_dims:
            dims = ", ".join(map(str, self.head_dims))
            reasons.append(f"head dim {need.head_dim} (has {dims})")
        if need.num_heads % need.num_kv_heads:
            reasons.append(f"{need.num_heads} query heads over {need.num_kv_heads} kv heads")
        elif (
            self.max_gqa_ratio is not None
            and need.num_heads // need.num_kv_heads > self.max_gqa_ratio
        ):
            ratio = need.num_heads // need.num_kv_heads
            reasons.append(f"{ratio} query heads a kv head (at most {self.max_gqa_ratio})")
        for name in ("window", "softcap", "sinks"):
            if getattr(need, name) and not getattr(self, name):
                reasons.append(f"attention {name}")
        return reasons


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """A tensor that a traced model takes from its checkpoint."""

    shape: tuple[int, ...]
    dtype: DType
