"""What will run, on what, with how much memory: decided before any weight is read.

The engine is built from the same plan that `halyard plan` prints.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halyard.compiler.cache import default_directory
from halyard.hal.errors import CapacityError, ConfigError
from halyard.hal.matrix import load_matrix
from halyard.hal.selection import Selection, select_backend
from halyard.hal.types import ITEM_SIZE, DeviceInfo, DType, KVSpec
from halyard.models.headers import read_headers, unpacked_shapes
from halyard.models.source import ModelSource, resolve_source
from halyard.models.spec import ModelSpec
from halyard.models.spec_cache import SpecCache
from halyard.runtime.config import EngineConfig
from halyard.runtime.cost_model import PreemptionCost

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ExecutionPlan", "MemoryPlan", "fit_memory", "make_plan", "resolve_model"]

GIB = 1 << 30
# On the CPU the pool shares memory with everything else on the machine, so it doesn't take all of
# its share by default; --kv-blocks asks for more.
CPU_KV_BYTES = 4 * GIB
CPU_BATCHED_TOKENS = 512
GPU_BATCHED_TOKENS = 8192  # about: see gpu_batched_tokens
# More rows a step are more tokens for the same reading of weights, as long as there is KV for them.
CPU_SEQUENCES = 256
GPU_SEQUENCES = 1024
# The host tier on a CPU is memory of the same kind: a copy there saves computing, not space.
HOST_SHARE = 0.25  # of the device's blocks
# Rates for the preemption cost model where nothing is measured: an order of magnitude is enough.
CPU_FLOPS_PER_CORE = 3e10
GPU_FLOPS = 2e14
CPU_COPY_BYTES_PER_SECOND = 5e9
GPU_LINK_BYTES_PER_SECOND = 2e10


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes and blocks."""

    total_bytes: int  # the device's
    budget_bytes: int  # memory_utilization of it
    weight_bytes: int
    activation_bytes: int  # estimate of a step's largest intermediates
    kv_bytes_per_token: int
    num_blocks: int
    num_host_blocks: int
    max_model_len: int
    concurrency: float  # sequences of max_model_len that fit at once
    limited_by: str  # what decided num_blocks


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """Everything decided about an engine before it is built."""

    source: ModelSource | None  # None: a config object with random weights
    spec: ModelSpec
    selection: Selection
    memory: MemoryPlan
    num_parameters: int
    max_num_sequences: int
    max_batched_tokens: int
    cost: PreemptionCost

    @property
    def dtype(self) -> DType:
        return self.selection.dtype

    def to_dict(self, bandwidth: float | None = None) -> dict[str, Any]:
        """Plain data for --json. `bandwidth` in bytes a second adds the limit it sets."""
        row, spec, memory = self.selection.row, self.spec, self.memory
        facts: dict[str, Any] = {
            "model": {
                "name": spec.name,
                "architecture": spec.architecture,
                "parameters": self.num_parameters,
                "layers": spec.num_layers,
                "heads": spec.num_heads,
                "kv_heads": spec.num_kv_heads,
                "head_dim": spec.head_dim,
                "vocab_size": spec.vocab_size,
                "context": spec.max_model_len,
                "checkpoint_dtype": spec.dtype,
                "checkpoint_packing": spec.packing or None,
            },
            "backend": row.name,
            "status": row.status,
            "device": asdict(self.selection.device),
            "dtype": {"name": self.dtype, "reason": self.selection.dtype_reason},
            "kernels": {
                "paged attention": row.kernels,
                "block moves": row.kernels,
                "between attentions": row.graph,
            },
            "rejected": [
                {"backend": r.row.name, "reasons": list(r.reasons) or ["later in the order"]}
                for r in self.selection.others
            ],
            "memory": asdict(memory),
            "max_num_sequences": self.max_num_sequences,
            "max_batched_tokens": self.max_batched_tokens,
        }
        if bandwidth:
            per_token = memory.weight_bytes
            facts["limits"] = {
                "read_bytes_per_second": bandwidth,
                "decode_tokens_per_second_at_one_sequence": bandwidth / max(per_token, 1),
                "what": "a decode step reads all weights once",
            }
        return facts


def resolve_model(
    model: Any,
    revision: str | None = None,
    mirror: Path | None = None,
    cache_dir: Path | None = None,
) -> tuple[ModelSource | None, ModelSpec]:
    """A name, a folder or a transformers config object -> its source (None for the last) and spec."""
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        source = resolve_source(model, revision, mirror)
        cache = SpecCache((cache_dir or default_directory()) / "specs")
        return source, ModelSpec.load(source, cache)
    config: PretrainedConfig = model
    return None, ModelSpec.from_hf(config)


def make_plan(config: EngineConfig) -> ExecutionPlan:
    """Decide everything that can be decided without weights.

    Raises:
        HalyardError: no such model or backend, or it doesn't fit; one line says what to do.
    """
    source, spec = resolve_model(config.model, config.revision, config.mirror, config.cache_dir)
    if source is None and config.load_format != "dummy":
        raise ConfigError('a config object has no weights: use load_format="dummy"')
    matrix = load_matrix(config.matrix)
    selection = select_backend(
        matrix,
        spec.requirements("float32", config.block_size),
        spec.dtype,
        requested=config.backend,
        dtype=config.dtype,
    )
    dtype = selection.dtype
    if config.quantization not in ("none", *selection.row.quantisation):
        able = [row.name for row in matrix.rows if config.quantization in row.quantisation]
        use = f"backend {' or '.join(able)}, or " if able else ""
        raise ConfigError(
            f"backend {selection.row.name} has no {config.quantization} weights: use "
            f"{use}quantization none"
        )
    parameters = _count_parameters(source, spec, config.load_format)
    computes = selection.row.kernels != "null"
    on_cpu = selection.device.kind == "cpu"
    sequences = _max_num_sequences(config, selection.device)
    batched = config.max_batched_tokens or max(
        CPU_BATCHED_TOKENS if on_cpu else gpu_batched_tokens(selection.device.num_cores), sequences
    )
    kv = spec.kv_spec(dtype, config.block_size)
    memory = fit_memory(
        config,
        spec,
        kv,
        selection.device,
        weight_bytes=_weight_bytes(config, spec, parameters, dtype) if computes else 0,
        max_batched_tokens=batched,
        bytes_per_block=kv.bytes_per_block if computes else kv.num_layers * ITEM_SIZE[dtype],
    )
    flops = selection.device.num_cores * CPU_FLOPS_PER_CORE if on_cpu else GPU_FLOPS
    link = CPU_COPY_BYTES_PER_SECOND if on_cpu else GPU_LINK_BYTES_PER_SECOND
    cost = PreemptionCost(
        bytes_per_block=kv.bytes_per_block,
        link_bytes_per_second=selection.device.link_bytes_per_second or link,
        prefill_tokens_per_second=flops / (2.0 * max(parameters, 1)),
    )
    return ExecutionPlan(source, spec, selection, memory, parameters, sequences, batched, cost)


def gpu_batched_tokens(num_cores: int) -> int:
    """Tokens of a step that fill a GPU evenly: a few of them less or more cost a whole turn.

    Products are cut into tiles of 128 rows. Half as many tiles as there are multiprocessors, times an
    even number of tiles of columns, occupy all of them in every turn (benchmarks/results).
    """
    tiles = [num_cores * turns // 4 for turns in (1, 2, 4, 8) if num_cores * turns % 4 == 0]
    best = min(
        (128 * number for number in tiles), key=lambda n: abs(n - GPU_BATCHED_TOKENS), default=0
    )
    near = GPU_BATCHED_TOKENS * 3 // 4 <= best <= GPU_BATCHED_TOKENS * 5 // 4
    return best if near else GPU_BATCHED_TOKENS


def _max_num_sequences(config: EngineConfig, device: DeviceInfo) -> int:
    default = CPU_SEQUENCES if device.kind == "cpu" else GPU_SEQUENCES
    return config.max_num_sequences or default


def fit_memory(
    config: EngineConfig,
    spec: ModelSpec,
    kv: KVSpec,
    device: DeviceInfo,
    *,
    weight_bytes: int,
    max_batched_tokens: int,
    bytes_per_block: int,
) -> MemoryPlan:
    """Size the KV pools. A pure function of its arguments.

    Raises:
        ConfigError: max_model_len is more than the model was made for.
        CapacityError: not even one sequence fits.
    """
    size = config.block_size
    asked_len = config.max_model_len
    if asked_len is not None and asked_len > spec.max_model_len:
        raise ConfigError(
            f"max_model_len {asked_len} is more than the {spec.max_model_len} positions "
            f"{spec.name} was made for"
        )
    wanted_len = asked_len or spec.max_model_len
    budget = int(device.memory_bytes * config.memory_utilization)
    item = ITEM_SIZE[kv.dtype]
    activations = max_batched_tokens * item * (8 * spec.hidden_size + 3 * spec.intermediate_size)
    sequences = _max_num_sequences(config, device)
    activations += sequences * spec.vocab_size * (item + 4)  # logits, and a copy in fp32
    left = budget - weight_bytes - activations
    if config.kv_blocks is not None:
        blocks, limited = config.kv_blocks, "kv_blocks"
    else:
        enough = sequences * math.ceil(wanted_len / size)
        choices = {
            "the memory budget": left // bytes_per_block,
            "max_num_sequences x max_model_len": enough,
        }
        if device.kind == "cpu":
            choices["the CPU's default of 4 GiB"] = max(
                CPU_KV_BYTES // bytes_per_block, math.ceil(wanted_len / size)
            )
        limited = min(choices, key=lambda key: choices[key])
        blocks = choices[limited]
    needed = math.ceil(wanted_len / size)
    if (asked_len is not None and blocks < needed) or blocks < 1:
        have = max(0, blocks) * size
        raise CapacityError(
            f"one sequence of {wanted_len} tokens needs {needed * bytes_per_block / GIB:.2f} GiB of "
            f"KV beside {weight_bytes / GIB:.2f} GiB of weights, but {budget / GIB:.2f} GiB may be "
            f"used: lower --max-model-len to {have} or less, or raise --memory-utilization"
            if have
            else f"{weight_bytes / GIB:.2f} GiB of weights and {activations / GIB:.2f} GiB for a "
            f"step leave no room for KV in {budget / GIB:.2f} GiB: use a smaller model or dtype, "
            "or raise --memory-utilization"
        )
    max_len = min(wanted_len, blocks * size)
    host = config.host_kv_blocks
    if host is None:
        host = int(blocks * HOST_SHARE)
        if device.kind == "cpu":  # of the same memory, so of the same budget
            host = min(host, max(0, left // bytes_per_block - blocks))
    return MemoryPlan(
        total_bytes=device.memory_bytes,
        budget_bytes=budget,
        weight_bytes=weight_bytes,
        activation_bytes=activations,
        kv_bytes_per_token=kv.bytes_per_token,
        num_blocks=blocks,
        num_host_blocks=host,
        max_model_len=max_len,
        concurrency=blocks / max(1, math.ceil(max_len / size)),
        limited_by=limited,
    )


def _weight_bytes(config: EngineConfig, spec: ModelSpec, parameters: int, dtype: DType) -> int:
    """What no group divides keeps its dtype, and so does an embedding that isn't the head too."""
    whole = parameters * ITEM_SIZE[dtype]
    if config.quantization == "none":
        return whole
    from halyard.hal.kernels.native.quantized_linear import GROUP  # with torch

    if spec.hidden_size % GROUP or spec.intermediate_size % GROUP:
        return whole
    bits = {"int8": 8, "int4": 4}[config.quantization]
    lookups = 0 if spec.tied else spec.vocab_size * spec.hidden_size
    quantised = parameters - lookups
    scales = quantised // GROUP * 2  # bf16
    return lookups * ITEM_SIZE[dtype] + quantised * bits // 8 + scales


def _count_parameters(source: ModelSource | None, spec: ModelSpec, load_format: str) -> int:
    """Exact from the checkpoint's headers; estimated from the config for random weights."""
    if source is not None and load_format != "dummy":
        return sum(map(math.prod, unpacked_shapes(read_headers(source)).values()))
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    mlp = 3 * spec.hidden_size * spec.expert_size * spec.num_experts
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tied else 2)
    return spec.num_layers * (attention + mlp) + embeddings
