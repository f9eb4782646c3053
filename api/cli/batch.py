"""`halyard batch`: a file of requests becomes a file of answers, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halyard.api.cli import options
from halyard.hal.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, metavar="IN.jsonl", help="requests, as OpenAI's batches"
    )
    parser.add_argument("output", type=Path, metavar="OUT.jsonl",
                        help="answers; what it holds already is not asked again")  # fmt: skip
    parser.add_argument(
        "--model", default="embedded", help="folder or Hugging Face id (%(default)s)"
    )
    parser.add_argument("--served-model-name", nargs="+", default=(), metavar="NAME",
                        help="what the requests call the model (default: its name)")  # fmt: skip
    options.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # Imported here: a wrong command line should not wait for the web framework.
    import asyncio

    from tqdm import tqdm

    from halyard.api.batch_run import read_done, read_lines, run_lines
    from halyard.api.host import EngineHost
    from halyard.api.loading import load_engine

    if args.input.resolve() == args.output.resolve():
        raise ConfigError("input and output are the same file")
    lines = read_lines(args.input)
    done = read_done(args.output)
    left = [line for line in lines if line.custom_id not in done]
    failed = 0
    if left:
        config = options.engine_config(args)
        host = EngineHost.of(load_engine(config, lambda _: None), args.served_model_name)
        bar = tqdm(total=len(lines), initial=len(lines) - len(left), unit="request",
                   dynamic_ncols=True, disable=not sys.stderr.isatty())  # fmt: skip

        def on_done(ok: bool) -> None:
            nonlocal failed
            failed += not ok
            bar.update()

        async def work() -> None:
            try:
                with args.output.open("a", encoding="utf-8") as output:
                    await run_lines(host, left, output, on_done)
            finally:
                await host.close(0.0)

        try:
            asyncio.run(work())
        except OSError as error:
            raise ConfigError(f"can't write {args.output}: {error}") from None
        finally:
            bar.close()
    print(
        f"{len(lines)} requests: {len(lines) - len(left)} were there, {len(left) - failed} "
        f"answered, {failed} refused",
        file=sys.stderr,
    )
    return 0
