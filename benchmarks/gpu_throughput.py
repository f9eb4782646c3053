"""The five workloads on both shapes, in variants, within a time budget: one JSON line a cell.

PYTHONPATH=pkg python benchmarks/gpu_throughput.py --out $OUT/throughput.jsonl --budget 520 \
    --variant base --variant in-turn:overlap=false --variant big:max_batched_tokens=16384

A variant is NAME or NAME:field=value,field=value with fields of EngineConfig, or +PASS for a compiler
pass that Inductor doesn't ask for by itself, -PASS for one that is left out (give either a cache_dir of
its own). Each (variant, shape)
has one engine; its workloads run in the order given, each with one unmeasured run and --repeat
measured ones. What doesn't fit in the budget any more is left out and named at the end. With
--profile every cell is followed by where the engine's time went, phase by phase; --trace DIR adds a
page for each cell with the device's kernels, of a shorter form of the workload, and the host's times
of the whole one.

PYTHONPATH=pkg python benchmarks/gpu_throughput.py --show results.jsonl prints a table against the
peers of the comparison instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halyard.runtime.engine import Engine
    from halyard.runtime.llm import LLM
    from halyard.runtime.workloads import Workload

WORKLOADS = ("decode", "mixed", "prefix", "prefill", "single")
_ROOM = 1.3  # a cell is begun if the budget holds that many times what its shape's last one took

# One H100 80GB, bf16, dummy weights: vLLM 0.26 on the same requests; output tokens a second, for
# prefill all tokens.
PEERS = {
    "1b": {"mixed": 24682, "decode": 31046, "prefill": 226447, "prefix": 18722, "single": 465},
    "8b": {"mixed": 9944, "decode": 16834, "prefill": 40036, "prefix": 8206, "single": 153},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--variant", action="append", default=[], metavar="NAME[:field=value,...]")
    parser.add_argument("--size", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--backend", help="a row of hw_matrix.yaml")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured runs of each cell")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    parser.add_argument("--profile", action="store_true", help="add the engine's phases")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write a profile of each cell")
    parser.add_argument("--out", type=Path, help="JSONL to append to, beside standard output")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a table of results")
    args = parser.parse_args()
    if args.show is not None:
        show(args.show)
        return 0
    deadline = time.monotonic() + args.budget
    left_out: list[str] = []
    for variant in args.variant or ["base"]:
        name, _, text = variant.partition(":")
        for shape in args.shapes:
            run_engine(args, name, parse_fields(text), shape, deadline, left_out)
    if left_out:
        print(f"no time left for: {', '.join(left_out)}", file=sys.stderr)
    return 0


def parse_fields(text: str) -> dict[str, Any]:
    """field=value,... -> options; values are JSON where they can be, else text."""
    fields: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        if part[0] in "+-":
            change_passes(part[1:], part[0] == "+")
            continue
        field, _, value = part.partition("=")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return fields


def change_passes(name: str, wanted: bool) -> None:
    """Let Inductor ask for one more pass, or no longer for one, from here on."""
    from halyard.compiler.graphs.inductor import InductorCompiler

    asked = InductorCompiler.passes

    def passes(*arguments: Any) -> tuple[str, ...]:
        others = tuple(one for one in asked(*arguments) if one != name)
        return (*others, name) if wanted else others

    InductorCompiler.passes = passes  # type: ignore[method-assign]


def run_engine(
    args: argparse.Namespace,
    name: str,
    fields: dict[str, Any],
    shape: str,
    deadline: float,
    left_out: list[str],
) -> None:
    """All workloads on one engine."""
    from halyard.models.shapes import shape_config
    from halyard.runtime.bench import measure_throughput, report
    from halyard.runtime.llm import LLM
    from halyard.runtime.workloads import load_workload

    cells = [f"{name}/{shape}/{workload}" for workload in args.workloads]
    if time.monotonic() + 30 > deadline:
        left_out += cells
        return
    options = {"model": shape_config(shape), "load_format": "dummy", "backend": args.backend}
    with LLM(**(options | fields)) as llm:
        last = 0.0
        for cell, workload_name in zip(cells, args.workloads, strict=True):
            if time.monotonic() + last * _ROOM > deadline:
                left_out.append(cell)
                continue
            workload = load_workload(workload_name, llm.plan.spec.vocab_size, args.size)
            before = llm.engine.stats()
            began = time.monotonic()
            measured = measure_throughput(llm, workload, args.repeat, args.warmup)
            last = time.monotonic() - began
            result = {"variant": name, "options": fields, "shape": shape, "size": args.size}
            result |= report(llm, measured)
            if args.profile:
                after = llm.engine.stats()
                steps = max(1, after.steps - before.steps)
                result["milliseconds_a_step"] = {
                    phase: 1e3 * (seconds - before.phase_seconds.get(phase, 0.0)) / steps
                    for phase, seconds in after.phase_seconds.items()
                }
            if args.trace is not None:
                result["profile"] = trace(args.trace, cell, llm, workload)
            line = json.dumps(result)
            print(line, flush=True)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as file:
                    file.write(line + "\n")
                    file.flush()
                    os.fsync(file.fileno())


def trace(directory: Path, cell: str, llm: LLM, workload: Workload) -> dict[str, Any]:
    """Profile fewer requests with shorter answers: the profiler keeps every launch of every step."""
    from halyard.api.profile_page import profile_page
    from halyard.runtime.bench import measure_throughput
    from halyard.runtime.profile import profiled

    most = 320 if workload.name == "mixed" else 48  # there what joins and leaves is what counts
    short = replace(
        workload,
        requests=tuple(
            replace(one, max_tokens=min(one.max_tokens, most)) for one in workload.requests[:256]
        ),
    )
    with host_parts(llm.engine) as seconds, profiled(llm.engine, host_only=True) as host:
        measure_throughput(llm, workload)
    print(host.table(), file=sys.stderr, flush=True)
    for name, spent in seconds.items():
        print(f"    of it {name:<12}{1e3 * spent / host.steps:9.3f} ms", file=sys.stderr)
    with profiled(llm.engine) as profile:
        measure_throughput(llm, short)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{cell.replace('/', '-')}.html").write_text(profile_page(profile, cell))
    print(profile.table(), file=sys.stderr, flush=True)
    for name, seconds, calls in profile.kernels[:24]:
        each = 1e3 * seconds / profile.steps
        print(f"  {each:8.3f} ms {calls / profile.steps:7.1f}x {name[:100]}", file=sys.stderr)
    return profile.to_dict() | {"host_only": host.to_dict()["host"]}


@contextmanager
def host_parts(engine: Engine) -> Iterator[dict[str, float]]:
    """Seconds in calls that the profile's parts are made of."""
    from halyard.runtime.batcher import PackedStep

    executor = engine.executor
    calls: list[tuple[Any, str]] = [(executor.batcher, "pack"), (executor.sampler, "prepare"), (PackedStep, "put"),
             (executor.device, "fetch"), (executor.device, "mark")]  # fmt: skip
    seconds = {name: 0.0 for _, name in calls}

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            seconds[name] += time.perf_counter() - began
            return result

        return call

    calls = [(owner, name) for owner, name in calls if hasattr(owner, name)]
    before = [getattr(owner, name) for owner, name in calls]
    for (owner, name), function in zip(calls, before, strict=True):
        setattr(owner, name, timed(name, function))
    try:
        yield seconds
    finally:
        for (owner, name), function in zip(calls, before, strict=True):
            setattr(owner, name, function)


def show(path: Path) -> None:
    """A table: the figure that counts for each workload, and how it stands to the peer's."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    print(f"{'variant':<14} {'shape':<5} {'workload':<9} {'tok/s':>10} {'of vLLM 0.26':>12}")
    for row in rows:
        kind = "total" if row["workload"] == "prefill" else "output"
        rate = row[f"{kind}_tokens_per_second"]
        shape = row.get("shape") or row["model"].removeprefix("shape-")
        peer = PEERS.get(shape, {}).get(row["workload"])
        share = f"{rate / peer:>11.0%}" if peer and row.get("size") == "gpu" else ""
        print(
            f"{row.get('variant', '-'):<14} {shape:<5} {row['workload']:<9} {rate:>10,.0f} {share:>12}"
        )


if __name__ == "__main__":
    sys.exit(main())
