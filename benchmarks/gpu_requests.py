"""What requests cost that ask for more than the likeliest token: rates beside a greedy batch's, in one run.

PYTHONPATH=pkg python benchmarks/gpu_requests.py [--shape 1b] [--rows 256] [--case NAME ...]

Each case runs twice on an engine that has rehearsed, as a server without work does; the first run shows
what only a first request waits for. Dummy weights: their distributions are flat, so filters keep tens of
thousands of tokens (benchmarks/sampler.py has others).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_all import make_model

from halyard import LLM, SamplingParams
from halyard.runtime.request import Constraint

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 200}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GUIDED = {"guided": Constraint.json_schema(SCHEMA), "temperature": 1.0}
# What every request asks for.
ALL: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
    "top_k 50, top_p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "repetition penalty": {"repetition_penalty": 1.1},
    "frequency penalty": {"frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {5: 1.0, 77: -2.0}},
    "logprobs 5": {"logprobs": 5},
    "prompt_logprobs 1": {"prompt_logprobs": 1},
    "JSON schema": GUIDED,
    "4 answers": {"n": 4, "temperature": 1.0},
}
# What one of them asks for, beside others that are greedy.
ONE: dict[str, dict[str, Any]] = {
    "one with logprobs": {"logprobs": 2},
    "one with a penalty": {"repetition_penalty": 1.2},
    "one with a JSON schema": GUIDED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b", choices=("1b", "8b"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt and each answer")
    parser.add_argument("--case", nargs="+", help="only these, beside greedy")
    args = parser.parse_args()
    numbers = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(args.shape, Path(folder))
        with LLM(folder, load_format="dummy", backend="cuda") as llm:
            while llm.engine.rehearse():
                pass

            def rate(asked: list[dict[str, Any]]) -> float:
                plain = {"temperature": 0.0, "max_tokens": args.tokens, "ignore_eos": True}
                params = [SamplingParams(**{**plain, **own}) for own in asked]
                prompts = [
                    [numbers.randrange(1000, 100_000) for _ in range(args.tokens)] for _ in asked
                ]
                started = time.perf_counter()
                found = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - started
                return sum(len(one.token_ids) for each in found for one in each.outputs) / seconds

            def show(name: str, asked: list[dict[str, Any]]) -> None:
                first, second = rate(asked), rate(asked)
                print(
                    f"{args.shape} {name:<24} {first:>9.0f} {second:>9.0f} {second / greedy:>7.2f}",
                    flush=True,
                )

            greedy = max(rate([{}] * args.rows) for _ in range(3))
            print(f"{'':<27} {'first':>9} {'second':>9} {'x greedy':>9}   tokens a second")
            for name, own in ALL.items():
                if not args.case or name in args.case:
                    show(name, [own] * (args.rows // own.get("n", 1)))
            for name, own in ONE.items():
                if not args.case or name in args.case:
                    show(name, [own] + [{}] * (args.rows - 1))


if __name__ == "__main__":
    main()
