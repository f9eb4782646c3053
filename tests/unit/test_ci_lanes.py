"""CI's lanes come from hw_matrix.yaml, and one that fails or hangs fails the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halyard.hal.matrix import load_matrix

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ci(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    import lanes

    return lanes


def test_every_row_that_computes_has_a_lane() -> None:
    done = subprocess.run(
        [sys.executable, "ci/matrix.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {lane["lane"]: lane for lane in json.loads(done.stdout)["include"]}
    assert {"reference", "cpu-eager", "triton-targets", "tvm-targets"} <= set(found)
    assert {"tests-tvm", "tests-triton"} <= set(found)
    for row in load_matrix(ROOT / "hw_matrix.yaml").rows:
        if row.kernels != "null" and row.device == "cpu" and row.name in found:
            assert row.name in found[row.name]["arguments"]
    for lane in found.values():
        for word in lane["arguments"]:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word


def test_a_lane_that_goes_wrong_is_told(
    ci: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = ci.Lane("good", ("-c", "print('fine')"))
    bad = ci.Lane("bad", ("-c", "import sys; sys.exit('broken')"))
    stuck = ci.Lane("stuck", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(ci, "lanes", lambda: [good, bad, stuck])
    monkeypatch.setattr(sys, "argv", ["lanes.py", "--jobs", "2", "--lane", "good"])
    assert ci.main() == 0
    assert "fine" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lanes.py", "--jobs", "3", "--seconds", "5"])
    assert ci.main() == 1
    told = capsys.readouterr().out
    assert "broken" in told
    words = {line.split()[0]: line for line in told.splitlines() if line.endswith(" s")}
    assert "passed" in words["good"]
    assert "FAILED (1)" in words["bad"]
    assert "TOO SLOW" in words["stuck"]


def test_a_lane_runs_with_its_own_environment(ci: Any) -> None:
    lane = ci.Lane("own", ("-c", "import os; print(os.environ['TRITON_INTERPRET'])"),
                   {"TRITON_INTERPRET": "1"})  # fmt: skip
    assert "TRITON_INTERPRET" not in os.environ
    assert ci.run_lane(lane, 60.0).output.strip() == "1"
