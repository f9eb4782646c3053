"""`halyard serve` as a process of its own, on a free port."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

__all__ = ["ServeProcess"]

ROOT = Path(__file__).resolve().parents[2]


class ServeProcess:
    """Started at once; `wait_ready` waits for the line that says so. Always `stop` it."""

    def __init__(self, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "pkg"), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "halyard.api.cli.main", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        self.url = ""
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, word: str, seconds: float = 120.0) -> str:
        """The first line from now on that holds `word`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                raise AssertionError(f"no {word!r} in {seconds} s: {self.errors}") from None
            if not line:
                raise AssertionError(f"ended before it said {word!r}: {self.errors}")
            if found := re.search(r"http://\S+:\d+", line):
                self.url = found.group()
            if word in line:
                return line

    def stop(self, seconds: float = 20.0) -> int:
        """Ask it to end, at last kill it; the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        for reader in self._readers:
            reader.join(5)
        return status

    def engines(self) -> list[int]:
        """Pids of the engine processes."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task").glob("*/children")
                for pid in pid.read_text().split()]  # fmt: skip

    @property
    def stderr(self) -> str:
        return "".join(self.errors)

    def _read_output(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put("")

    def _read_errors(self) -> None:
        if self.process.stderr is not None:
            self.errors.extend(self.process.stderr)
