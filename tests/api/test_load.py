"""The load test with faults, short: 60 streams, disconnects, bad requests, a kill of the engine's process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from serve_process import ROOT, ServeProcess

sys.path.insert(0, str(ROOT / "benchmarks"))
from load import Load, arguments, make_keys


class _Server:
    """What Load needs of an asyncio process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


def test_under_load_with_kills_nothing_hangs_leaks_or_answers_wrongly(tmp_path: Path) -> None:
    args = arguments(["--streams", "60", "--seconds", "14", "--kill-every", "4", "--tokens", "48"])
    keys = make_keys(tmp_path / "keys.json", 3)
    server = ServeProcess(
        "--backend", "null", "--kv-blocks", "1024", "--host-kv-blocks", "0",
        "--api-keys", str(tmp_path / "keys.json"),
    )  # fmt: skip
    try:
        server.wait_for("Ready:", 200)
        port = int(server.url.rsplit(":", 1)[1])
        process: Any = _Server(server.process.pid)
        report = asyncio.run(Load(port, args, keys).run(process))
    finally:
        status = server.stop()
    assert not report["wrong"]
    assert report["requests"]["kills"] >= 1
    assert report["requests"]["restarts"] >= 1
    assert report["requests"]["whole"] >= 60
    assert report["requests"]["left"] >= 1
    assert report["requests"]["bad_refused"] >= 1
    assert report["requests"]["bad_key_refused"] >= 1
    assert status == 0
    assert "Traceback" not in server.stderr
