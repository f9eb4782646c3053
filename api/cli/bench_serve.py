"""`halyard bench serve`: load a server over HTTP, at rates or numbers of streams."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from halyard.hal.errors import ConfigError, HalyardError

if TYPE_CHECKING:
    from halyard.runtime.workloads import WorkloadRequest

__all__ = ["add_arguments", "run"]

_STARTING = 900.0  # seconds that a server may take to load
_BUSY = 0.9  # of its time, from where on the client may be slower than the server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", help="a server that runs; without it, one is started: give its arguments after --")
    add("--model", help="what the server calls its model (default: the first it lists)")
    add("--workload", default="mixed", metavar="NAME|FILE", help="as for throughput")
    add("--size", choices=("gpu", "cpu"), default="cpu", help="of a built-in workload")
    add("--requests", type=int, metavar="N", help="the first N of the workload (default: all)")
    add("--vocab-size", type=int, default=512, metavar="N",
        help="prompt tokens are drawn below it (default 512)")  # fmt: skip
    add("--concurrency", type=int, nargs="+", default=[], metavar="N",
        help="closed loop: so many requests at once; several are measured in turn")  # fmt: skip
    add("--rate", type=float, nargs="+", default=[], metavar="R",
        help="open loop: requests a second, arriving at random; several in turn")  # fmt: skip
    add("--ttft", type=float, metavar="S", help="goodput: seconds to the first token at most")
    add("--tpot", type=float, metavar="S", help="goodput: seconds a token at most, after the first")
    add("--token-ids", action="store_true",
        help="ask for token ids too: tokens without text (random weights) send no event otherwise")  # fmt: skip
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add("--pause", type=float, default=0.0, metavar="S",
        help="leave the server in peace for so many seconds before each load (default 0)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the arrivals")
    add("server", nargs="*", metavar="-- SERVER ARGUMENT",
        help="arguments of `halyard serve` for a server of its own")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from halyard.api.load import Goal, run_load, summary
    from halyard.runtime.workloads import load_workload

    if (args.url is None) == (not args.server):
        raise ConfigError("give --url of a server, or -- and the arguments of one to start")
    workload = load_workload(args.workload, args.vocab_size, args.size)
    requests = workload.requests[: args.requests]
    goal = Goal(args.ttft, args.tpot)
    loads: list[dict[str, Any]] = [{"concurrency": number} for number in args.concurrency]
    loads += [{"rate": rate} for rate in args.rate]
    found = []
    with _server(args) as url:
        model = args.model or _first_model(url, args.api_key)
        for load in loads or [{}]:
            time.sleep(max(0.0, args.pause))
            done = asyncio.run(
                run_load(
                    url,
                    model,
                    _unheard(requests, args),
                    key=args.api_key,
                    seed=args.seed,
                    token_ids=args.token_ids,
                    **load,
                )
            )
            found.append(summary(done, goal))
            print(_line(found[-1]), file=sys.stderr)
    result = {
        "engine": "halyard" if args.server else "server",
        "url": url,
        "model": model,
        "workload": workload.name,
        "size": args.size,
        "requests": len(requests),
        "prompt_tokens": sum(len(one.prompt_token_ids) for one in requests),
        "runs": found,
    }
    print(json.dumps(result), flush=True)
    return 1 if any(one["failed"] for one in found) else 0


def _unheard(
    requests: Sequence[WorkloadRequest], args: argparse.Namespace
) -> Sequence[WorkloadRequest]:
    """A built-in workload's requests with other tokens each time, alike among themselves as before.

    Else the server would have the prompts of the run before in its prefix cache. A file's stay.
    """
    from halyard.runtime.workloads import WORKLOADS

    if args.workload not in WORKLOADS:
        return requests
    shift = secrets.randbelow(args.vocab_size)
    return [
        replace(
            one, prompt_token_ids=tuple((t + shift) % args.vocab_size for t in one.prompt_token_ids)
        )
        for one in requests
    ]


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """The address of the server, which is started and ended here if none was named."""
    if args.url is not None:
        yield args.url.rstrip("/")
        return
    command = [sys.executable, "-m", "halyard.api.cli.main", "serve", "--port", "0", *args.server]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise AssertionError("a pipe was asked for")
        for line in process.stdout:
            if address := re.search(r"http://\S+:\d+", line):
                yield address.group()
                return
        raise HalyardError(f"the server ended with status {process.wait()} before it was ready")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _first_model(url: str, key: str | None) -> str:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    headers = {"authorization": f"Bearer {key}"} if key else {}
    deadline = time.monotonic() + _STARTING
    while True:
        try:
            with urlopen(Request(f"{url}/v1/models", headers=headers), timeout=30) as answer:
                return str(json.load(answer)["data"][0]["id"])
        except HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise HalyardError(f"{url} lists no model: {error}") from error
            time.sleep(0.2)  # it listens already and is still loading
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise HalyardError(f"{url} lists no model: {error}") from error


def _line(found: dict[str, Any]) -> str:
    """A run for the eye."""
    load = (
        f"rate {found['rate']:g}/s" if found["rate"] else f"{found['concurrency'] or 'all'} at once"
    )
    parts = [
        f"{load}: {found['output_tokens_per_second']:,.1f} tok/s, "
        f"{found['requests_per_second']:.2f} requests/s, goodput "
        f"{found['goodput_requests_per_second']:.2f}/s, {found['failed']} failed"
    ]
    if found["tokens_per_event"]:
        parts.append(f"{found['tokens_per_event']:.1f} tokens an event")
    for name in ("ttft", "tpot", "itl"):
        at = found[name]
        if at:
            parts.append(
                f"{name} ms: p50 {1e3 * at['p50']:.1f}, p90 {1e3 * at['p90']:.1f}, "
                f"p99 {1e3 * at['p99']:.1f}"
            )
    if found["client_busy"] > _BUSY:
        parts.append(
            f"this client worked {found['client_busy']:.0%} of the time: it may be what was measured"
        )
    return "; ".join(parts)
