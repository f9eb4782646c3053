"""What the server costs: tokens a second of 256 concurrent streams over HTTP, beside the same requests offline.

    python benchmarks/serve_overhead.py --backend cpu
    python benchmarks/serve_overhead.py --backend null
    python benchmarks/serve_overhead.py --backend null --step-ms 3.4 --tokens 512

With `--step-ms` the null backend's step takes that long, as on a device that works on alone: 3.4 is
an H100's with 256 rows of a 1B model.

The engine gets one core for itself, the server and the client that reads the streams share another
(two cores at least). Offline is `LLM.generate` on one core. Prints JSON, of the best run: times to
the first text and between reads that brought some, and the processor time of server and client.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
OFFLINE = """
import json, sys, time
from halyard import LLM, SamplingParams
backend, streams, tokens, runs = sys.argv[1], *map(int, sys.argv[2:])
llm = LLM("embedded", backend=backend, kv_blocks=8192, host_kv_blocks=0)
params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
best = 1e9
for run in range(runs):
    prompts = [[300 + number + 300 * run, 5, 9, 11] for number in range(streams)]
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    best = min(best, time.perf_counter() - started)
print(json.dumps(streams * tokens / best))
"""


def move(pid: int, core: int) -> None:
    """All threads of a process to one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task.name), {core})


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@dataclass
class Stream:
    """One request and what came of it."""

    number: int
    times: list[float]  # when it began, and each read that brought text
    events: int = 0
    tail: bytes = b""

    def take(self, data: bytes) -> None:
        if found := data.count(b"data: {"):
            self.events += found
            self.times.append(time.perf_counter())
        self.tail = (self.tail + data[-16:])[-16:]


def request(first: int, tokens: int) -> bytes:
    body = json.dumps({"prompt": [first, 5, 9, 11], "max_tokens": tokens, "stream": True,
                       "temperature": 0, "ignore_eos": True}).encode()  # fmt: skip
    return (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip


def read_all(port: int, firsts: Iterable[int], tokens: int) -> list[Stream]:
    """Streams to their ends. Without asyncio: the client takes time from the server, on one core."""
    streams = []
    with selectors.DefaultSelector() as selector:
        for first in firsts:
            connection = socket.create_connection(("127.0.0.1", port))
            stream = Stream(first, [time.perf_counter()])
            connection.sendall(request(first, tokens))
            selector.register(connection, selectors.EVENT_READ, stream)
            streams.append(stream)
        while selector.get_map():
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)
                if data:
                    key.data.take(data)
                    continue
                selector.unregister(key.fileobj)
                key.fileobj.close()
                if b"[DONE]" not in key.data.tail:
                    raise AssertionError(f"a stream broke off: {key.data.tail!r}")
    return streams


def served(port: int, pid: int, args: argparse.Namespace) -> dict[str, float]:
    best = {"served_tokens_per_second": 0.0}
    total = args.streams * args.tokens
    for run in range(args.runs):
        pids = (pid, *children(pid)[:1], os.getpid())  # server, engine, this client
        started, before = time.perf_counter(), [cpu_seconds(one) for one in pids]
        firsts = (300 + number + 300 * run for number in range(args.streams))
        found = read_all(port, firsts, args.tokens)
        rate = total / (time.perf_counter() - started)
        spent = [cpu_seconds(one) - then for one, then in zip(pids, before, strict=True)]
        if rate <= best["served_tokens_per_second"]:
            continue
        ttft = [one.times[1] - one.times[0] for one in found]
        gaps = [later - sooner for one in found for sooner, later in pairwise(one.times[1:])]
        best = {
            "served_tokens_per_second": round(rate),
            "tokens_per_event": round(total / sum(one.events for one in found), 2),
        }
        for name, seconds in zip(("server", "engine", "client"), spent, strict=True):
            best[f"{name}_us_per_token"] = round(1e6 * seconds / total, 1)
        for name, values in (("ttft", ttft), ("gap", gaps)):
            for percent in (50, 99):
                milliseconds = 1e3 * float(np.percentile(values, percent))
                best[f"{name}_ms_p{percent}"] = round(milliseconds, 1)
    return best


def main(args: argparse.Namespace) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "pkg"), "PYTHONUNBUFFERED": "1"}
    if args.step_ms:
        environment["HALYARD_NULL_STEP_MS"] = str(args.step_ms)
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {cores[0]})
    numbers = [str(number) for number in (args.streams, args.tokens, args.runs)]
    done = subprocess.run([sys.executable, "-c", OFFLINE, args.backend, *numbers],
                          env=environment, stdout=subprocess.PIPE, check=True)  # fmt: skip
    offline = float(done.stdout)
    server = subprocess.Popen(
        [sys.executable, "-m", "halyard.api.cli.main", "serve", "--port", "0", "--backend",
         args.backend, "--kv-blocks", "8192", "--host-kv-blocks", "0", *args.serve],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        port = 0
        for line in server.stdout or ():
            if found := re.search(r"http://\S+:(\d+)", line):
                port = port or int(found[1])
            if "Ready" in line:
                break
        move(server.pid, cores[-1])
        os.sched_setaffinity(0, {cores[-1]})
        best = served(port, server.pid, args)
    finally:
        server.terminate()
        server.wait()
    print(json.dumps({
        "backend": args.backend, "streams": args.streams, "tokens": args.tokens,
        "offline_tokens_per_second": round(offline), "cores": len(cores), **best,
        "share": round(best["served_tokens_per_second"] / offline, 3),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=0.0, help="of the null backend")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("serve", nargs="*", help="more options of halyard serve, after --")
    sys.exit(main(parser.parse_args()))
