"""`halyard bench`: how fast this machine serves a workload, a batch shape, or requests over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halyard.api.cli import bench_serve, options
from halyard.hal.errors import ConfigError
from halyard.models.shapes import SHAPES, shape_config

if TYPE_CHECKING:
    from halyard.runtime.limits import DeviceLimits
    from halyard.runtime.llm import LLM

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    throughput = kinds.add_parser(
        "throughput", help="all requests of a workload at once; prints one line of JSON last"
    )
    _add_model(throughput)
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
    _add_profile(throughput)
    options.add_engine_arguments(throughput)

    latency = kinds.add_parser(
        "latency", help="decode steps of one batch shape, one by one; one line of JSON last"
    )
    _add_model(latency)
    latency.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default 1)")
    latency.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens of each prompt (default 128)"
    )
    latency.add_argument(
        "--steps", type=int, default=64, metavar="N", help="steps that are timed (default 64)"
    )
    _add_profile(latency)
    options.add_engine_arguments(latency)
    bench_serve.add_arguments(
        kinds.add_parser("serve", help="load a server over HTTP; one line of JSON last")
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="folder or Hugging Face id (or give --shape instead)"
    )
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="a model of this shape with random weights"
    )


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        nargs="?",
        const="profile.html",
        metavar="FILE",
        help="run once more and say where a step's time goes: a table, and a page in FILE",
    )
    parser.add_argument(
        "--no-limits", action="store_true", help="don't measure what the device can do at most"
    )


def run(args: argparse.Namespace) -> int:
    if args.kind == "serve":
        return bench_serve.run(args)
    if (args.model is None) == (args.shape is None):
        raise ConfigError("give a model or --shape, one of the two")
    if args.shape is not None:
        args.model, args.load_format = shape_config(args.shape), "dummy"
    config = options.engine_config(args)
    # Imported here: torch takes seconds, and a wrong command line should not wait for it.
    from halyard.runtime.limits import device_limits
    from halyard.runtime.llm import LLM

    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with LLM(**fields) as llm:
        limits = None
        if not args.no_limits and llm.plan.selection.row.kernels != "null":
            limits = device_limits(llm.engine.executor.device, llm.plan.dtype, config.cache_dir)
        measure = _throughput if args.kind == "throughput" else _latency
        print(json.dumps(measure(args, llm, limits)), flush=True)
    return 0


def _throughput(args: argparse.Namespace, llm: LLM, limits: DeviceLimits | None) -> dict[str, Any]:
    from halyard.runtime.bench import measure_throughput, report
    from halyard.runtime.workloads import WorkloadSize, load_workload

    on_cpu = llm.engine.executor.device.info.kind == "cpu"
    size: WorkloadSize = args.size or ("cpu" if on_cpu else "gpu")
    workload = load_workload(args.workload, llm.plan.spec.vocab_size, size)
    _say(
        f"{llm.plan.spec.name} on {llm.plan.selection.row.name}, workload {workload.name}: "
        f"{len(workload.requests)} requests, {workload.prompt_tokens} prompt and "
        f"{workload.answer_tokens} answer tokens"
    )
    measured = measure_throughput(llm, workload, args.repeat, args.warmup, limits)
    for number, seconds in enumerate(measured.seconds, start=1):
        _say(f"run {number}: {seconds:.3f} s")
    found = report(llm, measured) | {"size": size}
    if measured.least_seconds is not None:
        _say_limit(limits, measured.least_seconds, measured.best_seconds)
    if args.profile:
        found["profile"] = _profile(
            args, llm, lambda: measure_throughput(llm, workload, 1), workload.name
        )
    return found


def _latency(args: argparse.Namespace, llm: LLM, limits: DeviceLimits | None) -> dict[str, Any]:
    from halyard.runtime.latency import measure_steps, percentiles

    times = measure_steps(llm, args.batch, args.context, args.steps, limits)
    found: dict[str, Any] = {
        "engine": "halyard",
        "backend": llm.plan.selection.row.name,
        "model": llm.plan.spec.name,
        "dtype": llm.plan.dtype,
        "device": llm.engine.executor.device.info.name,
        "batch": args.batch,
        "context": args.context,
        "steps": len(times.seconds),
        "step_seconds": percentiles(times.seconds),
    }
    milliseconds = {name: 1e3 * value for name, value in found["step_seconds"].items()}
    _say("a step, ms: " + ", ".join(f"{name} {ms:.3f}" for name, ms in milliseconds.items()))
    if times.least_seconds is not None and times.seconds:
        median = found["step_seconds"]["p50"]
        found["limit_step_seconds"] = times.least_seconds
        found["fraction_of_limit"] = times.least_seconds / median
        _say_limit(limits, times.least_seconds, median)
    if args.profile:
        found["profile"] = _profile(
            args,
            llm,
            lambda: measure_steps(llm, args.batch, args.context, args.steps),
            f"batch {args.batch} at {args.context} tokens",
        )
    return found


def _profile(args: argparse.Namespace, llm: LLM, work: Any, what: str) -> dict[str, Any]:
    from halyard.api.profile_page import profile_page
    from halyard.runtime.profile import profiled

    with profiled(llm.engine) as profile:
        work()
    _say(profile.table())
    file = Path(args.profile)
    file.write_text(
        profile_page(profile, f"{llm.plan.spec.name} on {llm.plan.selection.row.name}: {what}"),
        encoding="utf-8",
    )
    _say(f"picture: {file}")
    return profile.to_dict()


def _say_limit(limits: DeviceLimits | None, least: float, seconds: float) -> None:
    if limits is not None:
        _say(
            f"the device's limit is {least:.4g} s ({limits.bytes_per_second / 1e9:,.0f} GB/s, "
            f"{limits.flops_per_second / 1e12:,.2f} TFLOP/s): this is {least / seconds:.0%} of it"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
