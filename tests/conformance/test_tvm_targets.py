"""Sources for other targets: generated in a process of its own, whatever becomes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halyard.hal.kernels.tvm import emit
from halyard.hal.kernels.tvm.emit import KERNELS, emit_source

pytest.importorskip("tvm", reason='needs pip install "halyard[tvm]"')

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("target", "dtype", "word"),
    [
        ("cuda", "bfloat16", "__global__"),
        ("opencl", "float32", "__kernel"),
        ("rocm", "float16", ".amdhsa_kernel"),
    ],
)
def test_source_is_generated(target: str, dtype: str, word: str) -> None:
    made = emit_source(target, dtype)
    assert (made.status, made.reason) == ("generated", "")
    assert made.kernels == len(KERNELS)
    assert word in made.source


def test_what_goes_wrong_is_one_cell() -> None:
    failed = emit_source("no-such-target", "float32")
    assert failed.status == "failed"
    assert failed.reason
    assert "\n" not in failed.reason
    assert emit_source("cuda", "float32", timeout=0.05).status == "timeout"


def test_a_crash_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", "import os; os.abort()"], **options)

    monkeypatch.setattr(emit.subprocess, "run", run)
    made = emit_source("cuda", "float32")
    assert made.status == "crashed"
    assert made.reason.startswith("signal 6")


def test_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "ci/tvm_targets.py", "--json", str(report), "--target", "metal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(report.read_text())["cells"]
    assert {(c["target"], c["dtype"], c["status"]) for c in cells} == {
        ("metal", "float32", "generated"),
        ("metal", "float16", "generated"),
    }
