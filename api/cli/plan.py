"""`halyard plan MODEL`: everything that is decided before a weight is read."""

from __future__ import annotations

import argparse
import json

from halyard.api.cli.options import add_engine_arguments, engine_config
from halyard.models.shapes import SHAPES, shape_config

__all__ = ["add_arguments", "run"]

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="embedded", help="folder, hub id or 'embedded'")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights in this shape instead"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    changes = {}
    if args.shape:
        changes = {"model": shape_config(args.shape), "load_format": "dummy"}
    config = engine_config(args, **changes)
    from halyard.hal.devices.cpu import measure_read_bandwidth
    from halyard.runtime.planner import make_plan

    plan = make_plan(config)
    bandwidth = plan.selection.device.bandwidth_bytes_per_second
    if bandwidth is None and plan.selection.device.kind == "cpu":
        bandwidth = measure_read_bandwidth()
    facts = plan.to_dict(bandwidth)
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    spec, row, memory = plan.spec, plan.selection.row, plan.memory
    device = plan.selection.device

    def line(name: str, text: str) -> None:
        print(f"{name:<14} {text}")

    line("model", f"{spec.name} ({spec.architecture}), {plan.num_parameters / 1e6:,.1f} M parameters, "
         f"context {spec.max_model_len}")  # fmt: skip
    line("backend", f"{row.name} [{row.status}]: {row.role}")
    line("device", f"{device.name}, {device.num_cores} cores, {device.memory_bytes / GIB:.1f} GiB")
    line("dtype", f"{plan.dtype} ({plan.selection.dtype_reason})")
    for op, part in facts["kernels"].items():
        line("", f"{op}: {part}")
    unpacked = f", unpacked from {spec.packing}" if spec.packing else ""
    line("weights", f"{memory.weight_bytes / GIB:.2f} GiB{unpacked}")
    line("KV", f"{memory.kv_bytes_per_token:,} bytes a token; {memory.num_blocks:,} blocks of "
         f"{config.block_size} ({memory.num_blocks * config.block_size:,} tokens), limited by "
         f"{memory.limited_by}; {memory.num_host_blocks:,} host blocks")  # fmt: skip
    line("budget", f"{memory.budget_bytes / GIB:.1f} of {memory.total_bytes / GIB:.1f} GiB, "
         f"{memory.activation_bytes / GIB:.2f} GiB of it for a step's intermediates")  # fmt: skip
    line("concurrency", f"{memory.concurrency:,.0f} sequences of {memory.max_model_len} tokens, "
         f"{plan.max_batched_tokens} tokens a step")  # fmt: skip
    if bandwidth:
        rate = facts["limits"]["decode_tokens_per_second_at_one_sequence"]
        line("limit", f"one sequence: at most {rate:,.0f} tokens a second, for every token reads all "
             f"weights at {bandwidth / 1e9:.0f} GB/s")  # fmt: skip
    print("not chosen")
    for report in facts["rejected"]:
        print(f"  {report['backend']:<12} {'; '.join(report['reasons'])}")
    return 0
