"""`halyard generate`: continue a prompt in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from halyard.api.cli import options
from halyard.hal.errors import ConfigError, RequestError
from halyard.runtime.request import SamplingParams

__all__ = ["add_arguments", "add_sampling_arguments", "run", "sampling_params"]

INTERRUPTED = 130  # exit status of a program ended by Ctrl-C, as in shells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="embedded", help="folder or Hugging Face id (default: embedded)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue (default: read standard input)")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from it")
    add_sampling_arguments(parser, max_tokens=128)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of text"
    )
    options.add_engine_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"longest answer (default: {max_tokens})",
    )
    group.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="keep the N likeliest tokens (0: all)"
    )
    group.add_argument(
        "--sampling-seed", type=int, metavar="N", help="same seed, same answer (default: random)"
    )
    group.add_argument("--stop", action="append", help="text that ends the answer; repeatable")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.sampling_seed,
        stop=args.stop,
    )


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)  # a wrong option should be told before a model loads
    prompt = _prompt(args)
    config = options.engine_config(args)
    from halyard.api.cli.local_stream import Interrupt, stream_answer
    from halyard.runtime.build import build_engine

    built = build_engine(config)
    try:
        if built.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer: text can't be generated", "prompt"
            )
        ids = built.tokenizer.encode(prompt)
        text, count, reason = "", 0, None
        with Interrupt() as interrupt:
            for new in stream_answer(built.engine, built.tokenizer, ids, params, interrupt):
                text += new.text
                count += len(new.token_ids)
                reason = new.finish_reason or reason
                if not args.json:
                    print(new.text, end="", flush=True)
        if args.json:
            answer: dict[str, Any] = {
                "prompt": prompt,
                "text": text,
                "finish_reason": reason or "abort",
                "prompt_tokens": len(ids),
                "output_tokens": count,
            }
            print(json.dumps(answer, ensure_ascii=False))
        else:
            print()
        return INTERRUPTED if interrupt.pressed else 0
    finally:
        built.engine.close()


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        prompt = str(args.prompt)
    elif args.prompt_file is not None:
        try:
            prompt = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read the prompt from {args.prompt_file}: {error}") from error
    else:
        if sys.stdin.isatty():
            print("Type the prompt; Ctrl-D ends it.", file=sys.stderr)
        prompt = sys.stdin.read()
    if not prompt:
        raise ConfigError("the prompt is empty: give --prompt, --prompt-file or standard input")
    return prompt
