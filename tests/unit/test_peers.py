"""benchmarks/cpu/peers.py offers to install and to run what it can, and nothing else."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "cpu"


def test_whoever_is_installed_has_a_worker() -> None:
    packages = runpy.run_path(str(FOLDER / "peers.py"))["PACKAGES"]
    workers = runpy.run_path(str(FOLDER / "peer_worker.py"))["ENGINES"]
    assert {name.split("-")[0] for name in packages} | {"halyard"} == set(workers)


@pytest.mark.parametrize("words", [("install", "gone"), ("run", "--engines", "halyard", "gone")])
def test_an_unknown_peer_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "peers.py"), "--folder", str(tmp_path / "peers"), *words],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no peer 'gone': known are openvino, vllm" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "peers").exists()
