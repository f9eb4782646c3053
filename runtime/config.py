"""Configuration: parsed once, frozen, every field explained. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from halyard.hal.errors import ConfigError
from halyard.runtime.cost_model import PreemptionCost

__all__ = ["EngineConfig", "PreemptionPolicy", "SchedulerConfig"]

PreemptionPolicy = Literal["auto", "swap", "recompute"]


def _check(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a user chooses about an engine."""

    model: Any  # folder, hub id, "embedded", or a transformers config object
    backend: str | None = None  # a row of hw_matrix.yaml; None: the best that can run here
    dtype: str = "auto"  # "auto" (the checkpoint's, where the device computes in it), or a DType
    quantization: str = "none"  # of the linears' weights: "none", "int8" or "int4" (backend cpu)
    max_model_len: int | None = (
        None  # tokens of prompt and answer; None: the model's, fitted to memory
    )
    block_size: int = 16  # tokens a KV block
    memory_utilization: float = 0.9  # share of the device's memory that weights and KV may take
    kv_blocks: int | None = None  # KV blocks on the device; None: what fits
    host_kv_blocks: int | None = None  # KV blocks in the host tier; None: the device's default
    load_format: str = "auto"  # "auto" (safetensors) or "dummy" (random weights)
    seed: int = 0  # of random weights and of requests without a seed
    max_num_sequences: int | None = None  # answers that run at once; None: the device's default
    max_batched_tokens: int | None = None  # tokens a step; None: the device's default
    prefix_cache: bool = True  # share full blocks of equal prefixes
    max_queue_len: int | None = 1024  # waiting requests of a server before it answers 429
    preemption: PreemptionPolicy = "auto"  # swap or recompute; auto asks the cost model
    overlap: bool = True  # issue a step before the last one is back, where the device allows it
    device_sampling: bool = True  # draw with the device's own kernels, where it has some
    shared_attention: bool = True  # read KV blocks that rows share once, where the kernels can
    revision: str | None = None  # branch, tag or commit of a hub model
    mirror: Path | None = None  # folder of mirrored models: names are looked up there alone
    require_verified: bool = False  # refuse a model without a manifest; one with is always verified
    manifest_digest: str | None = None  # SHA-256 that the manifest must have; None: any
    matrix: Path | None = None  # another hw_matrix.yaml
    cache_dir: Path | None = None  # compiled artefacts; None: HALYARD_CACHE_DIR or ~/.cache/halyard
    dump_dir: Path | None = None  # write the graph after each compiler pass there
    progress: bool = False  # progress bars while loading and compiling

    def __post_init__(self) -> None:
        for name in ("cache_dir", "dump_dir", "mirror", "matrix"):
            if isinstance(folder := getattr(self, name), str):  # as people write it in Python
                object.__setattr__(self, name, Path(folder).expanduser())
        _check(0 < self.memory_utilization <= 1, "memory_utilization", self.memory_utilization,
               "greater than 0 and at most 1")  # fmt: skip
        _check(self.dtype in ("auto", "float32", "float16", "bfloat16"), "dtype", self.dtype,
               "auto, float32, float16 or bfloat16")  # fmt: skip
        _check(self.quantization in ("none", "int8", "int4"), "quantization", self.quantization,
               "none, int8 or int4")  # fmt: skip
        _check(self.load_format in ("auto", "dummy"), "load_format", self.load_format,
               "auto or dummy")  # fmt: skip
        _check(self.preemption in get_args(PreemptionPolicy), "preemption", self.preemption,
               "auto, swap or recompute")  # fmt: skip
        for name in ("block_size", "max_num_sequences", "max_model_len", "kv_blocks",
                     "max_batched_tokens", "max_queue_len"):  # fmt: skip
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        _check(self.host_kv_blocks is None or self.host_kv_blocks >= 0, "host_kv_blocks",
               self.host_kv_blocks, "0 or greater")  # fmt: skip

    @classmethod
    def create(cls, **options: Any) -> EngineConfig:
        """Build from keyword options; an unknown one is a ConfigError that names it."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(unknown)}: known are {', '.join(sorted(known))}"
            )
        return cls(**options)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What the scheduler works with, resolved from EngineConfig, model and device."""

    num_blocks: int  # device blocks
    max_model_len: int  # no sequence grows longer; it must fit in num_blocks alone
    block_size: int = 16  # tokens a block
    num_host_blocks: int = 0  # blocks of the host tier; 0: none
    max_num_sequences: int = 256  # rows of a step
    max_batched_tokens: int = 512  # tokens of a step, at least max_num_sequences
    prefix_cache: bool = True  # share full blocks of equal prefixes
    preemption: PreemptionPolicy = "auto"  # how a sequence gives way when blocks run out
    cost: PreemptionCost = field(  # prices for "auto"
        default_factory=lambda: PreemptionCost(1 << 20, 10e9, 1000.0)
    )

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_model_len", "block_size", "max_num_sequences"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(self.num_host_blocks >= 0, "num_host_blocks", self.num_host_blocks, "0 or greater")
        _check(self.max_batched_tokens >= self.max_num_sequences, "max_batched_tokens",
               self.max_batched_tokens,
               f"at least max_num_sequences ({self.max_num_sequences})")  # fmt: skip
        _check(self.max_model_len <= self.num_blocks * self.block_size, "max_model_len",
               self.max_model_len,
               f"at most what the KV blocks hold ({self.num_blocks * self.block_size})")  # fmt: skip
