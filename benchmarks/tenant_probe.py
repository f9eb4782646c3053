"""Can a tenant tell by time to first token what another has asked? Measured on a real server.

PYTHONPATH=pkg python benchmarks/tenant_probe.py [--backend cpu] [--trials 20]

For each trial a fresh prompt of about 700 tokens: acme asks it (cold), acme asks again (warm), rival asks
it (probe). Then rival asks a prompt that nobody has asked (control). If tenants are kept apart, probe and
control can't be told from each other: the chance that a random probe is faster than a random control is
about a half. For warm against cold it is about one, or the probe would prove nothing.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from halyard.api.keys import create_key, edit_keys
from halyard.api.tenants import Tenant

WORDS = 230


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.json"
        with edit_keys(path) as content:
            content.tenants = {name: Tenant(name) for name in ("acme", "rival")}
            keys = {name: create_key(content, name) for name in content.tenants}
        command = [sys.executable, "-m", "halyard.api.cli.main", "serve", "--port", "0",
                   "--backend", args.backend, "--kv-blocks", "1024", "--api-keys", str(path)]  # fmt: skip
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = ""
            for line in server.stdout or ():
                if found := re.search(r"http://\S+:\d+", line):
                    url = url or found.group()
                if line.startswith("Ready"):
                    break
            told = measure(url, keys, args.trials)
        finally:
            server.terminate()
            server.wait(30)
    for name, times in told.items():
        print(f"{name:8} median {1e3 * statistics.median(times):7.1f} ms   "
              f"from {1e3 * min(times):7.1f} to {1e3 * max(times):7.1f}")  # fmt: skip
    print(
        f"warm faster than cold      {chance(told['warm'], told['cold']):.2f}   (1: the cache works)"
    )
    print(
        f"probe faster than control  {chance(told['probe'], told['control']):.2f}   (0.5: nothing leaks)"
    )
    return 0


def measure(url: str, keys: dict[str, str], trials: int) -> dict[str, list[float]]:
    rng = random.Random(0)
    told: dict[str, list[float]] = {"cold": [], "warm": [], "probe": [], "control": []}
    with httpx.Client(base_url=url, timeout=120) as http:

        def first_token(tenant: str, prompt: str) -> float:
            body = {"prompt": prompt, "max_tokens": 1, "stream": True}
            bring = {"authorization": f"Bearer {keys[tenant]}"}
            started = time.perf_counter()
            with http.stream("POST", "/v1/completions", json=body, headers=bring) as answer:
                answer.raise_for_status()
                seconds = 0.0
                for line in answer.iter_lines():
                    if line and not seconds:
                        seconds = time.perf_counter() - started
            return seconds

        def prompt() -> str:
            return " ".join(f"def f{rng.randrange(10**6)}(x):" for _ in range(WORDS // 3))

        for _ in range(3):
            first_token("acme", prompt())
        for _ in range(trials):
            asked, unasked = prompt(), prompt()
            told["cold"].append(first_token("acme", asked))
            told["warm"].append(first_token("acme", asked))
            pair = [("probe", asked), ("control", unasked)]
            rng.shuffle(pair)
            for name, text in pair:
                told[name].append(first_token("rival", text))
    return told


def chance(quick: list[float], slow: list[float]) -> float:
    """That a random one of the first is faster than a random one of the second."""
    return sum(a < b for a in quick for b in slow) / (len(quick) * len(slow))


if __name__ == "__main__":
    sys.exit(main())
