"""Load with faults: many streams, random disconnects, bad requests, kills of the engine's process, rotations.

    python benchmarks/load.py --backend null --streams 500 --seconds 120
    python benchmarks/load.py --backend cpu --streams 64 --seconds 120

Starts `halyard serve` on a free port of this machine and ends it. Streams belong to tenants, each with
a key and prompts of its own. Every answer, whole or left, is compared with what its own prompt must
give: on the null backend tokens that count on from the prompt's last one, on others the answer that
the same prompt got when nothing else ran; so another tenant's answer is a wrong one. Fails on a wrong
answer, a request without an end, a status that is not allowed, or blocks in use when all is over.
Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HALYARD = [sys.executable, "-m", "halyard.api.cli.main"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "pkg"), "PYTHONUNBUFFERED": "1"}
HUNG_SECONDS = 60.0  # without a byte: nobody answers any more
VOCABULARY = 4000  # of prompts; the embedded model's is a little larger
SPARE = 100  # tokens between the prompts of two tenants: more than an answer has
HELD = (
    "halyard_requests_running",
    "halyard_requests_waiting",
    "halyard_requests_swapped",
    "halyard_kv_blocks_used",
)
BAD: list[tuple[bytes, tuple[int, ...]]] = [
    (b"{", (400,)),
    (b'{"prompt": [1], "max_tokens": -1}', (400,)),
    (b'{"prompt": [99999999]}', (400,)),
    (json.dumps({"prompt": [1] * 5000}).encode(), (400,)),
    (b'{"prompt": [1], "model": "nobody"}', (404,)),
    (b'{"prompt": [1], "guided_regex": "("}', (400,)),
]


@dataclass
class Outcome:
    """What became of all requests."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    fingerprints: set[str] = field(default_factory=set)


@dataclass
class Answer:
    """One answer, as far as it came."""

    status: int = 0
    tokens: list[int] = field(default_factory=list)
    fingerprints: set[str] = field(default_factory=set)
    error: dict[str, Any] | None = None
    finished: bool = False


async def ask(port: int, body: bytes, key: str = "", leave_after: int | None = None) -> Answer:
    """POST /v1/completions; `leave_after` hangs up after that many events.

    Raises:
        TimeoutError: nothing came for a minute.
    """
    answer = Answer()
    reader, writer = await asyncio.wait_for(
        asyncio.open_connection("127.0.0.1", port), HUNG_SECONDS
    )
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Authorization: Bearer %s\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (key.encode(), len(body), body)
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HUNG_SECONDS)
        answer.status = int(head.split(b" ", 2)[1])
        if b"chunked" not in head.lower():
            told = json.loads(await asyncio.wait_for(reader.read(), HUNG_SECONDS))
            answer.error = told.get("error")
            _take(answer, told)
            return answer
        events = 0
        while True:
            size = int(await asyncio.wait_for(reader.readline(), HUNG_SECONDS), 16)
            chunk = (await asyncio.wait_for(reader.readexactly(size + 2), HUNG_SECONDS))[:-2]
            if not size:
                return answer
            for line in chunk.split(b"\n\n"):
                if line.startswith(b"data: {"):
                    _take(answer, json.loads(line[6:]))
                    events += 1
            if leave_after is not None and events >= leave_after:
                return answer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _take(answer: Answer, event: dict[str, Any]) -> None:
    answer.error = event.get("error") or answer.error
    if event.get("system_fingerprint"):
        answer.fingerprints.add(event["system_fingerprint"])
    for choice in event.get("choices", ()):
        answer.tokens += choice.get("token_ids") or ()
        answer.finished = answer.finished or bool(choice.get("finish_reason"))


async def get(port: int, path: str, key: str = "", body: bytes | None = None) -> tuple[int, str]:
    """Status and text of a GET, or of a POST with a body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    method, data = ("GET", b"") if body is None else ("POST", body)
    writer.write(
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    text = (await asyncio.wait_for(reader.read(), 300)).decode()
    writer.close()
    head, _, rest = text.partition("\r\n\r\n")
    return int(head.split(" ", 2)[1]), rest


class Load:
    """Workers on one server until a deadline."""

    def __init__(self, port: int, args: argparse.Namespace, keys: list[str]) -> None:
        self.port = port
        self.args = args
        self.admin, *self.keys = keys
        self.random = random.Random(args.seed)
        self.outcome = Outcome()
        self.expected: list[dict[int, list[int]]] = [{} for _ in self.keys]
        self.deadline = 0.0

    def first(self, tenant: int) -> int:
        """A token that a tenant's prompts begin with; no other's do."""
        each = (VOCABULARY - 300) // len(self.keys)
        return 300 + tenant * each + self.random.randrange(each - SPARE)

    def body(self, first: int, count: int, stream: bool = True) -> bytes:
        prompt = [first] if self.args.backend == "null" else [first, first + 1, first + 2]
        return json.dumps(
            {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True,
             "return_token_ids": True, "stream": stream}
        ).encode()  # fmt: skip

    async def learn(self) -> None:
        """Answers when nothing else runs."""
        if self.args.backend == "null":
            return
        for tenant, key in enumerate(self.keys):
            for _ in range(8):
                first = self.first(tenant)
                answer = await ask(self.port, self.body(first, self.args.tokens), key)
                self.expected[tenant][first] = answer.tokens

    def check(self, tenant: int, first: int, count: int, answer: Answer) -> None:
        """An answer, or the beginning of one that was left."""
        wanted = (
            [first + 1 + number for number in range(count)]
            if self.args.backend == "null"
            else self.expected[tenant][first][:count]
        )
        if not answer.finished:
            wanted = wanted[: len(answer.tokens)]
        if answer.tokens != wanted:
            told = f"{answer.tokens[:20]} is not {wanted[:20]}"
            self.outcome.wrong.append(f"tenant {tenant}, {first}: {told}")
        if len(answer.fingerprints) > 1:
            self.outcome.wrong.append(f"{first}: fingerprints {answer.fingerprints}")
        self.outcome.fingerprints |= answer.fingerprints

    async def work(self, tenant: int) -> None:
        rng, counts = self.random, self.outcome.counts
        while time.monotonic() < self.deadline:
            kind = rng.random()
            try:
                if kind < 0.05:
                    body, fine = rng.choice(BAD)
                    answer = await ask(self.port, body, rng.choice([self.keys[tenant], "nobody"]))
                    if answer.status == 401:
                        counts["bad_key_refused"] += 1
                        continue
                    if answer.status not in (*fine, 503, 429):
                        self.outcome.wrong.append(f"{body[:60]!r} was answered {answer.status}")
                    counts["bad_refused"] += 1
                    continue
                await self.stream(tenant, leave=kind < 0.15, whole=kind > 0.97)
            except TimeoutError:
                counts["hung"] += 1
                self.outcome.wrong.append("a request had no end")
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                counts["broken_connections"] += 1
                self.outcome.wrong.append(f"connection: {error!r}")

    async def stream(self, tenant: int, *, leave: bool, whole: bool) -> None:
        rng, counts = self.random, self.outcome.counts
        expected = self.expected[tenant]
        first = rng.choice(list(expected)) if expected else self.first(tenant)
        count = rng.randrange(1, self.args.tokens + 1)
        after = rng.randrange(0, 8) if leave else None
        body = self.body(first, count, not whole)
        answer = await ask(self.port, body, self.keys[tenant], after)
        self.outcome.tokens += len(answer.tokens)
        if answer.error is not None:
            code = answer.error.get("code")
            counts[f"error_{code}"] += 1
            # A rotation drops no request: only a kill is an excuse.
            excused = ("engine_dead", "not_ready") if self.args.kill_every else ()
            if code not in (*excused, "queue_full"):
                self.outcome.wrong.append(f"{answer.status}: {answer.error}")
            await asyncio.sleep(1.0)
            return
        self.check(tenant, first, count, answer)
        if answer.finished:
            counts["whole"] += 1
        elif leave:
            counts["left"] += 1
        else:
            self.outcome.wrong.append(f"{answer.status}: ended after {len(answer.tokens)} tokens")

    async def kill(self, server: asyncio.subprocess.Process) -> None:
        while time.monotonic() + 5 < self.deadline:
            await asyncio.sleep(self.args.kill_every * self.random.uniform(0.6, 1.4))
            if time.monotonic() > self.deadline:
                return  # what is left over is looked for now
            pids = engines(server.pid)
            if pids and (await get(self.port, "/ready"))[0] == 200:
                os.kill(pids[0], self.random.choice([signal.SIGKILL, signal.SIGSEGV]))
                self.outcome.counts["kills"] += 1
            if (await get(self.port, "/health"))[0] != 200:
                self.outcome.wrong.append("/health was not 200")

    async def rotate(self) -> None:
        """To the other checkpoint and back: they differ in their fingerprints alone."""
        models = itertools.cycle([str(self.args.other), "embedded"])
        while time.monotonic() + 5 < self.deadline:
            await asyncio.sleep(self.args.reload_every)
            asked = {
                "mode": self.random.choice(["beside", "in_place"]),
                "model": next(models),
            }
            status, _ = await get(
                self.port, "/admin/reload", self.admin, json.dumps(asked).encode()
            )
            self.outcome.counts[f"reload_{status}"] += 1
            if status not in (200, 409, 503):
                self.outcome.wrong.append(f"/admin/reload was answered {status}")

    async def run(self, server: asyncio.subprocess.Process) -> dict[str, Any]:
        await self.learn()
        started = time.monotonic()
        self.deadline = started + self.args.seconds
        chaos = [self.kill(server)] if self.args.kill_every else []
        chaos += [self.rotate()] if self.args.reload_every else []
        await asyncio.gather(
            *chaos, *(self.work(n % len(self.keys)) for n in range(self.args.streams))
        )
        seconds = time.monotonic() - started
        await self.settle(server)
        return {
            "backend": self.args.backend,
            "streams": self.args.streams,
            "tenants": len(self.keys),
            "seconds": round(seconds, 1),
            "tokens": self.outcome.tokens,
            "requests": dict(sorted(self.outcome.counts.items())),
            "fingerprints": len(self.outcome.fingerprints),
            "wrong": self.outcome.wrong[:20],
        }

    async def settle(self, server: asyncio.subprocess.Process) -> None:
        """All is over: nothing may be left."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            _, text = await get(self.port, "/metrics", self.admin)
            left = {
                name: sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.M)))
                for name in HELD
            }
            left["engines too many"] = len(engines(server.pid)) - 1
            if (await get(self.port, "/ready"))[0] == 200 and not any(left.values()):
                found = re.findall(r"^halyard_engine_restarts_total{.*} (\S+)$", text, re.M)
                self.outcome.counts["restarts"] = int(sum(map(float, found)))
                return
            await asyncio.sleep(0.2)
        self.outcome.wrong.append(f"left over: {left}")


def make_keys(path: Path, tenants: int) -> list[str]:
    """A file of keys: an admin's, then one of each tenant."""
    found = []
    for name, options in (("boss", ["--admin"]), *((f"tenant{n}", []) for n in range(tenants))):
        done = subprocess.run(
            [*HALYARD, "keys", "create", name, *options, "--api-keys", str(path)],
            env=ENVIRONMENT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found += re.findall(r"^(hal-\S+)", done.stdout, re.M)
    return found


def engines(pid: int) -> list[int]:
    """Child processes."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text().split()]


async def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.json"
        args.other = Path(folder) / "other"
        shutil.copytree(
            ROOT / "models" / "embedded", args.other,
            ignore=shutil.ignore_patterns("*.py", "__pycache__"),
        )  # fmt: skip
        (args.other / "notes.txt").write_text("another version")
        return await measure(args, path, make_keys(path, args.tenants))


async def measure(args: argparse.Namespace, path: Path, keys: list[str]) -> int:
    server = await asyncio.create_subprocess_exec(
        *HALYARD, "serve", "--port", "0", "--backend", args.backend, "--api-keys", str(path),
        "--max-restarts", "1000", "--kv-blocks", "4096", "--host-kv-blocks", "0", *args.serve,
        stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        port = 0
        while line := (await server.stdout.readline()).decode():
            if found := re.search(r"http://\S+:(\d+)", line):
                port = port or int(found[1])
            if "Ready" in line:
                break
        else:
            return 1
        report = await Load(port, args, keys).run(server)
    finally:
        if server.returncode is None:
            server.terminate()
        status = await server.wait()
    report["exit_status"] = status
    print(json.dumps(report, indent=2))
    return 1 if report["wrong"] or status else 0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="null")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tenants", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=64, help="most of an answer")
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds; 0: never")
    parser.add_argument("--reload-every", type=float, default=0.0, help="seconds; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("serve", nargs="*", help="more options of halyard serve, after --")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(arguments())))
