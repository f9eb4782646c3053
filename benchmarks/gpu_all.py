"""Everything that a GPU is asked, in one go within a time budget: proof first, then figures.

PYTHONPATH=pkg python benchmarks/gpu_all.py --out DIR [--budget 560] [--only suite serve ...]

Each part is a process of its own with a limit; one that fails or is too slow is ended with all that it
started, named at the end, and the next one begins. What doesn't fit in the budget any more is left out.
Parts: suite (the conformance suite), serve (bench serve at 256 streams beside the offline rate), 1b and
8b (throughput), attention, swap. Try it anywhere: --backend cpu --size cpu --shape 160m --only serve.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-m", "halyard.api.cli.main"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Part:
    """One command. Its output goes to `<name>.log` too."""

    name: str
    command: list[str]
    limit: float  # seconds


def parts(options: argparse.Namespace) -> Iterator[Part]:
    out: Path = options.out
    bench = [sys.executable, str(ROOT / "benchmarks")]
    backend = ["--backend", options.backend]
    jobs = str(max(1, (os.cpu_count() or 1) - 2))
    yield Part(
        "suite",
        [*CLI, "conformance", "run", *backend, "--jobs", jobs, "--report", str(out / "suite")],
        300,
    )
    offline = [
        *CLI, "bench", "throughput", *backend, "--shape", options.shape, "--size", options.size,
        "--workload", "decode", "--warmup", "1", "--repeat", "3", "--no-limits",
    ]  # fmt: skip
    yield Part("serve-offline", offline, 90)
    served = [
        *CLI, "bench", "serve", "--size", options.size, "--workload", "decode", "--token-ids",
        "--pause", "2", "--concurrency", *["256"] * 6, "--", str(out / "model"), "--load-format", "dummy", *backend,
    ]  # fmt: skip
    yield Part("serve", served, 150)
    for shape, limit in (("1b", 120.0), ("8b", 200.0)):
        command = [
            bench[0], f"{bench[1]}/gpu_throughput.py", "--shapes", shape, *backend, "--size",
            options.size, "--budget", str(limit - 15), "--out", str(out / "throughput.jsonl"),
            "--variant", "base",
        ]  # fmt: skip
        yield Part(shape, command, limit)
    for dim in ("128", "64"):
        yield Part(
            f"attention-{dim}",
            [bench[0], f"{bench[1]}/gpu_attention.py", "--dim", dim, "--seconds", "0.1"],
            60,
        )
    yield Part("swap", [bench[0], f"{bench[1]}/gpu_swap.py", "--seconds", "0.1"], 45)


def run(part: Part, out: Path, limit: float) -> str:
    """What became of it: "", or why it failed. Its last lines are printed."""
    with (out / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            part.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            failed = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            failed = f"ended after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
    for line in (out / f"{part.name}.log").read_text(errors="replace").splitlines()[-12:]:
        print(f"    {line[:300]}")
    return failed


def make_model(shape: str, folder: Path) -> None:
    """A folder that `serve --load-format dummy` takes: configs, and the embedded model's tokenizer."""
    from halyard.models.shapes import shape_config

    folder.mkdir(parents=True, exist_ok=True)
    shape_config(shape).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')  # as checkpoints have it
    for name in TOKENIZER:
        shutil.copy(ROOT / "models" / "embedded" / name, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose name begins so")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--shape", default="1b", help="of the model that is served")
    parser.add_argument("--size", choices=("gpu", "cpu"), default="gpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    make_model(options.shape, options.out / "model")
    end = time.perf_counter() + options.budget
    missed = []
    for part in parts(options):
        if options.only and not part.name.startswith(tuple(options.only)):
            continue
        left = end - time.perf_counter()
        if left < part.limit / 3:
            missed.append(f"{part.name}: left out, {left:.0f} s are left")
            continue
        started = time.perf_counter()
        print(f"{part.name}:", flush=True)
        failed = run(part, options.out, min(part.limit, left))
        print(f"    {time.perf_counter() - started:.0f} s", flush=True)
        if failed:
            missed.append(f"{part.name}: {failed}")
    print("\n".join(missed) or "all parts done")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
