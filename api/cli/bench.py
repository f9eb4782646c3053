"""`halyard bench throughput`: how fast this machine serves a workload."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from halyard.api.cli import options
from halyard.hal.errors import ConfigError
from halyard.models.shapes import SHAPES, shape_config

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    throughput = kinds.add_parser(
        "throughput", help="all requests of a workload at once; prints one line of JSON last"
    )
    throughput.add_argument(
        "model", nargs="?", help="folder or Hugging Face id (or give --shape instead)"
    )
    throughput.add_argument(
        "--shape", choices=sorted(SHAPES), help="a Llama of this shape with random weights"
    )
    throughput.add_argument(
        "--workload",
        default="mixed",
        metavar="NAME|FILE",
        help="mixed, decode, prefill, prefix, single, or a JSONL file of "
        '{"prompt_token_ids": [...], "max_tokens": n} (default: mixed)',
    )
    throughput.add_argument(
        "--size", choices=("gpu", "cpu"), help="of a built-in workload (default: the device's)"
    )
    throughput.add_argument(
        "--warmup", type=int, default=0, metavar="N", help="unmeasured runs first (default: 0)"
    )
    throughput.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="measured runs, the fastest counts (default: 1)",
    )
    options.add_engine_arguments(throughput)


def run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.shape is None):
        raise ConfigError("give a model or --shape, one of the two")
    if args.shape is not None:
        args.model, args.load_format = shape_config(args.shape), "dummy"
    config = options.engine_config(args)
    # Imported here: torch takes seconds, and a wrong command line should not wait for it.
    from halyard.runtime.bench import measure_throughput, report
    from halyard.runtime.llm import LLM
    from halyard.runtime.workloads import WorkloadSize, load_workload

    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with LLM(**fields) as llm:
        size: WorkloadSize = args.size or (
            "cpu" if llm.engine.executor.device.info.kind == "cpu" else "gpu"
        )
        workload = load_workload(args.workload, llm.plan.spec.vocab_size, size)
        print(
            f"{llm.plan.spec.name} on {llm.plan.selection.row.name}, workload {workload.name}: "
            f"{len(workload.requests)} requests, {workload.prompt_tokens} prompt and "
            f"{workload.answer_tokens} answer tokens",
            file=sys.stderr,
        )
        measured = measure_throughput(llm, workload, args.repeat, args.warmup)
        for number, seconds in enumerate(measured.seconds, start=1):
            print(f"run {number}: {seconds:.3f} s", file=sys.stderr)
        print(json.dumps({**report(llm, measured), "size": size}), flush=True)
    return 0
