"""CI's lanes come from hw_matrix.yaml, and one that fails or hangs fails the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halyard.hal.matrix import load_matrix

ROOT = Path(__file__).resolve().parents[2]
_STUCK = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


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


def running(pid: str) -> bool:
    """Not gone, and not dead with nobody to bury it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_what_stops_it_stops_its_lanes(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    program = (
        "import sys; sys.path.insert(0, 'ci'); import lanes\n"
        f"lanes.lanes = lambda: [lanes.Lane('stuck', ('-c', {_STUCK!r}, {str(mark)!r}))]\n"
        "sys.argv = ['lanes.py']; lanes.stop_on_signals(); sys.exit(lanes.main())"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 10
    while running(mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(mark.read_text())


def test_each_lane_runs_in_one_of_two_parts(
    ci: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [
        ci.Lane("arm64", ("-c", "")),
        ci.Lane("other", ("-c", "")),
    ]
    monkeypatch.setattr(ci, "lanes", lambda: both)
    lowered: list[bool] = []
    monkeypatch.setattr(ci, "yield_to_others", lambda: lowered.append(True))  # this process doesn't
    told = {}
    for part in ("beside", "rest"):
        monkeypatch.setattr(sys, "argv", ["lanes.py", "--part", part])
        assert ci.main() == 0
        told[part] = {
            line.split()[0] for line in capsys.readouterr().out.splitlines() if "passed" in line
        }
        assert lowered == [True]  # beside the tests, and not again
    assert told == {"beside": {"arm64"}, "rest": {"other"}}


def test_what_runs_beside_the_tests_yields_to_them(ci: Any) -> None:
    asks = "import os; print(os.getpriority(0, 0), getattr(os, 'sched_getscheduler', int)(0))"
    script = (
        "import os, sys; sys.path.insert(0, 'ci'); import lanes; lanes.yield_to_others()\n"
        f"print(lanes.run_lane(lanes.Lane('any', ('-c', {asks!r})), 60.0).output)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() in (["0", str(getattr(os, "SCHED_IDLE", None))], ["19", "0"])


def test_what_the_tests_do_without_lies_apart(ci: Any) -> None:
    where = {
        name: ci.run_lane(ci.Lane(name, ("-c", "import os; print(os.environ['PYTHONPATH'])")), 60.0)
        for name in ("tvm-targets", "tvm")
    }
    assert where["tvm"].output.split() == [str(ROOT / "pkg")]
    assert where["tvm-targets"].output.strip() == f"{ROOT / 'pkg'}{os.pathsep}{ci.BACKENDS}"


def test_a_lane_runs_with_its_own_environment(ci: Any) -> None:
    lane = ci.Lane("own", ("-c", "import os; print(os.environ['TRITON_INTERPRET'])"),
                   {"TRITON_INTERPRET": "1"})  # fmt: skip
    assert "TRITON_INTERPRET" not in os.environ
    assert ci.run_lane(lane, 60.0).output.strip() == "1"
