"""What is told about an engine when it is built: to clients, to people, to provenance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halyard.models.tokenizer import has_tokenizer
from halyard.runtime.config import EngineConfig
from halyard.runtime.intake import Limits
from halyard.runtime.port import EngineFacts

if TYPE_CHECKING:
    from halyard.runtime.planner import ExecutionPlan

__all__ = ["engine_facts"]


def engine_facts(
    plan: ExecutionPlan,
    config: EngineConfig,
    limits: Limits,
    bytes_per_block: int,
    start_seconds: dict[str, float],
) -> EngineFacts:
    """Gather them. Of the checkpoint only the names of its files are looked at."""
    row, device, source = plan.selection.row, plan.selection.device, plan.source
    dummy = config.load_format == "dummy"
    return EngineFacts(
        model_name=plan.spec.name,
        backend_name=row.name,
        limits=limits,
        max_queue_len=config.max_queue_len,
        device_name=device.name,
        dtype=plan.dtype,
        bytes_per_block=bytes_per_block,
        seed=config.seed,
        has_tokenizer=source is not None and has_tokenizer(source),
        cost_per_hour=row.cost_per_hour,
        start_seconds=start_seconds,
        plan=plan.to_dict() | {"block_size": config.block_size},
        provenance={
            "model": {
                "id": plan.spec.name,
                "architecture": plan.spec.architecture,
                "revision": source.revision if source is not None else None,
                "config_digest": plan.spec.digest(),
                "weights": "random" if dummy else "checkpoint",
                "random_seed": config.seed if dummy else None,
            },
            "backend": {
                "name": row.name,
                "device": row.device,
                "kernels": row.kernels,
                "graph": row.graph,
                "hardware": device.name,
                "arch": device.arch,
            },
            "plan": {
                "dtype": plan.dtype,
                "quantization": None if config.quantization == "none" else config.quantization,
                "block_size": config.block_size,
                "max_model_len": plan.memory.max_model_len,
                "max_batched_tokens": plan.max_batched_tokens,
            },
        },
    )
