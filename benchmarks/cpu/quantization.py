"""What weights of 8 and 4 bits cost in perplexity and bring in speed, side by side.

    python benchmarks/cpu/quantization.py --folder PEERS --shape 1b --rounds 5 --output FILE.json

Perplexity is the embedded model's on what its training held out: one file in twenty of CPython's
standard library (models/embedded/corpus.py), as this Python has it installed, in windows of 1,024
tokens spread evenly over all of it. Speed is of random weights of a shape (a checkpoint below
--folder, made if need be), each format in a process of its own, taking turns in rounds; the ratio is
bf16's seconds over the format's, round by round.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from peers import ROOT, Engine, checkpoint, spread, start, stream_read

FORMATS = ("none", "int8", "int4")
WINDOW = 1024  # tokens
WORKLOADS = ("single", "decode")


def held_out_windows(count: int) -> list[list[int]]:
    """Token ids of `count` windows of the held-out files, each behind an end of text."""
    sys.path.insert(0, str(ROOT / "models" / "embedded"))
    import corpus
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "models" / "embedded" / "tokenizer.json"))
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    ids: list[int] = []
    for name, text in corpus.documents():
        if corpus.is_held_out(name):
            ids += [*tokenizer.encode(text).ids, end]
    step = (len(ids) - WINDOW) // max(1, count - 1)
    return [ids[i * step : i * step + WINDOW] for i in range(count)]


def nats_a_token(quantization: str, windows: list[list[int]]) -> float:
    """The embedded model's mean loss over all tokens but each window's first."""
    from halyard import LLM, SamplingParams

    llm = LLM(model="embedded", dtype="bfloat16", quantization=quantization)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": window} for window in windows], params)
    total = 0.0
    for window, output in zip(windows, outputs, strict=True):
        scores = output.prompt_logprobs or []
        for token, score in zip(window[1:], scores[1:], strict=True):
            assert score is not None
            total -= score[token].logprob
    return total / sum(len(window) - 1 for window in windows)


def speeds(args: argparse.Namespace) -> tuple[list[Engine], list[float]]:
    """Each format's seconds by workload, and GB/s that memory was read with in between."""
    from halyard.models.shapes import shape_config
    from halyard.runtime.workloads import load_workload

    model = checkpoint(args.folder, args.shape)
    vocab_size = shape_config(args.shape).vocab_size
    names = [name if name != "none" else "" for name in FORMATS]
    engines = [
        start(f"halyard:{name}".rstrip(":"), args.folder, model, args.threads, args.logs)
        for name in names
    ]
    reads = []
    for number in range(-1, args.rounds):
        for workload_name in WORKLOADS:
            workload = load_workload(workload_name, vocab_size, "cpu")
            requests = [
                [[(t + number + 2) % vocab_size for t in one.prompt_token_ids], one.max_tokens]
                for one in workload.requests
            ]
            turn = number % len(engines)
            for engine in engines[turn:] + engines[:turn]:
                answer = engine.ask(requests=requests)
                if number >= 0:  # the first round warms up
                    engine.seconds.setdefault(workload_name, []).append(answer["seconds"])
                    engine.info["rss"] = answer["rss"]
            reads.append(stream_read())
    for engine in engines:
        engine.stop()
    return engines, reads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("peers"), help="of checkpoints")
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=64, help="of 1,024 held-out tokens")
    parser.add_argument("--logs", type=Path, default=Path("build/peers"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-speed", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "pkg"))
    windows = held_out_windows(args.windows)
    losses = {name: nats_a_token(name, windows) for name in FORMATS}
    engines, reads = ([], []) if args.no_speed else speeds(args)
    tokens = sum(len(window) - 1 for window in windows)
    print(f"embedded model in bf16, {tokens} held-out tokens", end="")
    print(f"; shape {args.shape}, {args.threads} threads, {args.rounds} rounds, stream read "
          f"{spread(reads)} GB/s" if reads else "")  # fmt: skip
    print("\n| weights | loss, nats | perplexity |"
          + "".join(f" {w}, s | bf16 / it |" for w in WORKLOADS if engines))  # fmt: skip
    print("|---" * (3 + 2 * len(WORKLOADS) * bool(engines)) + "|")
    for number, name in enumerate(FORMATS):
        line = f"| {name.replace('none', 'bf16')} | {losses[name]:.4f} "
        line += f"| {math.exp(losses[name]):.3f} |"
        for workload in WORKLOADS if engines else ():
            own, whole = engines[number].seconds[workload], engines[0].seconds[workload]
            ratios = [w / o for w, o in zip(whole, own, strict=True)]
            line += f" {spread(own)} | {spread(ratios)} |"
        print(line)
    if args.output:
        record = {
            "shape": args.shape,
            "threads": args.threads,
            "held_out_tokens": tokens,
            "nats_a_token": losses,
            "stream_read_gb_s": reads,
            "engines": {
                e.name: {"startup": e.startup, "seconds": e.seconds, "info": e.info}
                for e in engines
            },
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
