"""The suite itself: red cells are told apart, a worker's death costs one of them, reports hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halyard.api.cli.main import main
from halyard.hal.conformance import case as case_module
from halyard.hal.conformance import l2_blocks, results, runner
from halyard.hal.conformance.backend import BackendUnderTest, find_backend
from halyard.hal.conformance.case import Case, collect
from halyard.hal.conformance.evidence import accept, unproven
from halyard.hal.conformance.levels import LEVELS, MUTANTS, Level
from halyard.hal.conformance.mutants import MUTATIONS
from halyard.hal.conformance.page import write_page
from halyard.hal.errors import ConfigError
from halyard.hal.kernels.native.kernels import NativeKernels
from halyard.hal.matrix import load_matrix

ROOT = Path(__file__).resolve().parents[2]

# A level for these tests, importable by the worker: good, wrong, dead, stuck, and unclaimed cells.
MOODS = """
import os, subprocess, sys, time
from halyard.hal.conformance.case import Case
from halyard.hal.types import Requirements

def right(context):
    context.check(0.5, 1.0, "half")

def wrong(context):
    context.check(2.0, 1.0, "two")

def broken(context):
    {}["no such key"]

def dead(context):
    print("last words", flush=True)
    os.kill(os.getpid(), 11)

def stuck(context):
    if "MOODS_CHILD" in os.environ:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(os.environ["MOODS_CHILD"] + ".new", "w").write(str(child.pid))
        os.rename(os.environ["MOODS_CHILD"] + ".new", os.environ["MOODS_CHILD"])
    time.sleep(600)

def cases(backend):
    need = Requirements("float32", "float32", 7777777, 4, 2, 64)
    return [
        Case("L3", "right", right, "float32"), Case("L3", "wrong", wrong, "float32"),
        Case("L3", "broken", broken), Case("L3", "dead", dead),
        Case("L3", "stuck", stuck, seconds=1.0), Case("L3", "after", right, "float32"),
        Case("L3", "unclaimed", right, "float32", need),
    ]
"""

WORKER = """
import sys
from halyard.hal.conformance import case, worker
from halyard.hal.conformance.levels import Level
case.LEVELS = (Level("L3", "moods", "moods:cases"),)
case.MUTANTS = Level("mutants", "none", "moods:cases")
worker.collect = lambda backend, levels: case._provide(case.LEVELS[0], backend)
sys.exit(worker.main())
"""


@contextmanager
def moody(folder: Path) -> Iterator[tuple[BackendUnderTest, list[Case]]]:
    """The reference backend with the moody cases; workers know them too."""
    (folder / "moods.py").write_text(MOODS)
    (folder / "moody_worker.py").write_text(WORKER)
    spawn = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return spawn([command[0], "-m", "moody_worker", command[3]], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT / 'pkg'}")
        backend = find_backend("cpu:reference:eager")
        cases = case_module._provide(Level("L3", "moods", "moods:cases"), backend)
        patch.setattr(runner.subprocess, "Popen", popen)
        yield backend, cases


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of the moody cases, workers and all."""
    with moody(tmp_path_factory.mktemp("moods")) as given:
        return runner.run_cases(*given)


def test_each_way_to_go_wrong_is_one_cell(moods: list[dict[str, Any]]) -> None:
    status = {result["id"]: result["status"] for result in moods}
    assert status == {
        "L3.right[float32]": "passed",
        "L3.wrong[float32]": "failed",
        "L3.broken": "failed",
        "L3.dead": "crashed",
        "L3.stuck": "hung",
        "L3.after[float32]": "passed",
        "L3.unclaimed[float32]": "not_claimed",
    }
    told = {result["id"]: result for result in moods}
    assert told["L3.wrong[float32]"]["message"] == "two: error 2, at most 1 is allowed"
    assert "KeyError" in told["L3.broken"]["message"]
    assert "SIGSEGV" in told["L3.dead"]["message"]
    assert "last words" in told["L3.dead"]["detail"]
    assert (
        "head dim 7777777" in told["L3.unclaimed[float32]"]["message"]
        or (told["L3.unclaimed[float32]"]["message"])
    )


def test_reports_tell_them_apart(moods: list[dict[str, Any]], tmp_path: Path) -> None:
    backend = find_backend("cpu:reference:eager")
    report = results.make(backend, moods, seconds=1.0)
    assert report["summary"]["ok"] is False
    assert report["summary"]["levels"]["L3"] == {
        "passed": 2, "failed": 2, "crashed": 1, "hung": 1, "not_claimed": 1,
    }  # fmt: skip
    file = results.save(report, tmp_path / "out")
    assert results.load(file) == json.loads(json.dumps(report))
    suite = ElementTree.fromstring(results.junit(report)).find("testsuite")
    assert suite is not None
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "7", "failures": "2", "errors": "2", "skipped": "1"}
    page = write_page(tmp_path / "out").read_text()
    for text in ("1 crashed", "1 hung", "2 failed", "Some claims do not hold", "last words"):
        assert text in page
    better = [dict(r, status="passed") if r["id"] == "L3.dead" else r for r in moods]
    later = results.make(backend, better, seconds=1.0, previous=report)
    assert later["changes"] == [{"id": "L3.dead", "before": "crashed", "after": "passed"}]


def _is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_ctrl_c_keeps_what_is_done_and_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    monkeypatch.setenv("MOODS_CHILD", str(child))
    # A shell starts what it puts in the background deaf to Ctrl-C, and tests may run there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not child.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with moody(tmp_path) as (backend, cases):
        cases = [replace(c, seconds=100.0) if c.id == "L3.stuck" else c for c in cases]
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            with pytest.raises(runner.Interrupted) as stopped:
                runner.run_cases(backend, cases)
        finally:
            signal.signal(signal.SIGINT, before)
    ids = [result["id"] for result in stopped.value.results]
    assert "L3.right[float32]" in ids
    assert "L3.dead" in ids
    assert "L3.stuck" not in ids  # it neither crashed nor hung
    deadline = time.monotonic() + 20
    while _is_there(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_there(int(child.read_text()))  # what a case had started is gone too
    report = results.make(backend, stopped.value.results, seconds=1.0,
                          interrupted=True)  # fmt: skip
    assert "only a part of the suite was run" in unproven(report, backend.row)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_workers_end_with_a_runner_that_was_killed() -> None:
    runner_process = subprocess.Popen(
        [sys.executable, "-m", "halyard.api.cli.main", "conformance", "run", "--backend",
         "reference", "--level", "L3"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "pkg")},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    children = Path(f"/proc/{runner_process.pid}/task/{runner_process.pid}/children")
    tasks = children.parents[1]

    def workers() -> list[int]:
        return [int(pid) for task in tasks.glob("*/children") for pid in task.read_text().split()]

    deadline = time.monotonic() + 100
    while not workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = workers()
    time.sleep(1.0)  # so that it has begun
    runner_process.kill()
    runner_process.wait()
    while _is_there(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_there(worker)


def test_a_report_that_cannot_be_written_is_told_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--backend", "reference", "--level", "L0", "--report", str(tmp_path / "file")]
    assert main(["conformance", "run", *arguments]) == 2
    told = capsys.readouterr()
    assert "can't write the report" in told.err
    assert not told.out


def test_a_part_of_the_suite_proves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--backend", "reference", "--case", "L0.probe", "--report", str(tmp_path)]
    assert main(["conformance", "run", *arguments]) == 0
    report = results.load(tmp_path / "reference" / "results.json")
    row = load_matrix(ROOT / "hw_matrix.yaml").row("reference")
    assert unproven(report, row)[0] == "only a part of the suite was run"
    assert main(["conformance", "run", "--backend", "cpu-eager", "--dtype", "float16", "--level",
                 "L2"]) == 0  # fmt: skip
    assert "nothing of this is claimed" in capsys.readouterr().out


def test_a_wrong_claim_is_a_failure() -> None:
    """Kernels that claim a head dim which they can't do are red there, and nowhere else."""
    backend = find_backend("cpu:native:eager")
    assert backend.capabilities is not None
    boastful = replace(backend, capabilities=replace(backend.capabilities, head_dims=None))
    narrow = [c for c in collect(backend, ("L3",)) if c.id == "L3.head_dim.48[float32]"]
    assert not narrow[0].unclaimed(boastful)
    sinks = replace(backend, capabilities=replace(backend.capabilities, sinks=False))
    told = [c.unclaimed(sinks) for c in collect(backend, ("L3",)) if "sinks.chunked" in c.id]
    assert told
    assert all("attention sinks" in reasons for reasons in told)


def test_only_kernels_that_say_so_write_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's method of that name is nobody's business."""

    def asked() -> int:
        return sum(case.name == "written_alone" for case in l2_blocks.cases(backend))

    backend = find_backend("cpu-eager")
    assert asked() == 3
    monkeypatch.setattr(NativeKernels, "writes_alone", False)
    assert hasattr(NativeKernels, "write")
    assert asked() == 0
    monkeypatch.delattr(NativeKernels, "writes_alone")  # as before 1.4
    assert asked() == 0


def test_there_are_mutants_of_every_kind() -> None:
    assert len(MUTATIONS) >= 12


# The reference computes in fp32 whatever the dtype is, and a token at a time.
@pytest.mark.parametrize("backend", ["reference", "cpu:native:eager"])
def test_the_contract_levels_hold_and_kill_every_mutant(backend: str, tmp_path: Path) -> None:
    dtypes = ["--dtype", "float32"] if backend == "reference" else []
    status = main(
        ["conformance", "run", "--backend", backend, "--level", "L0", "L2", "L3", "mutants",
         "--report", str(tmp_path), *dtypes]
    )  # fmt: skip
    report = results.load(tmp_path / backend.replace(":", "-") / "results.json")
    assert status == 0
    assert report["summary"]["kill_rate"] == 1.0
    assert report["summary"]["levels"]["L3"]["passed"] > 50


def test_pytest_is_another_way_in(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "halyard.hal.conformance.pytest_plugin", "-q",
         "--pyargs", "halyard.hal.conformance", "--backend", "cpu:reference:eager", "--level", "L0",
         "-p", "no:cacheprovider"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "pkg"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout


def test_status_comes_from_reports(tmp_path: Path, moods: list[dict[str, Any]]) -> None:
    matrix = tmp_path / "hw_matrix.yaml"
    matrix.write_text(
        "# kept\nbackends:\n  - name: mine\n    device: cpu\n    kernels: reference\n"
        "    graph: eager\n    dtypes: [float32]\n    status: untested\n    role: a row  # kept too\n"
        "select: [mine]\npools: []\n"
    )
    backend = find_backend("mine", matrix)
    bad = results.save(results.make(backend, moods, seconds=1.0), tmp_path / "bad")
    assert accept([bad], matrix)[0].startswith("mine: untested (some claimed cells did not pass")
    assert load_matrix(matrix).row("mine").status == "untested"

    cells = [f"{level.name}.x[float32]" for level in (*LEVELS, MUTANTS)]
    good = [moods[0] | {"id": name} for name in cells]
    report = results.make(backend, good, seconds=1.0)
    assert unproven(report, backend.row) == []
    assert accept([results.save(report, tmp_path / "good")], matrix) == ["mine: verified"]
    row = load_matrix(matrix).row("mine")
    assert row.status == "verified"
    assert row.evidence is not None
    assert row.evidence.is_file()
    assert "# kept\n" in matrix.read_text()
    assert "# kept too\n" in matrix.read_text()
    assert accept([bad], matrix)  # and it can be lost again
    assert load_matrix(matrix).row("mine").status == "untested"
    assert matrix.read_text().count("evidence:") == 1


def test_every_verified_row_is_backed_by_its_report() -> None:
    for row in load_matrix(ROOT / "hw_matrix.yaml").rows:
        if row.evidence is not None and row.status == "verified":
            assert unproven(results.load(row.evidence), row) == [], row.name


def test_parts_can_be_named_by_hand() -> None:
    assert find_backend("cpu:reference:eager").row.kernels == "reference"
    with pytest.raises(ConfigError, match="no kernels part 'nonesuch'"):
        find_backend("cpu:nonesuch:eager")


def test_a_slow_case_does_not_hold_the_suite(moods: list[dict[str, Any]]) -> None:
    stuck = next(result for result in moods if result["id"] == "L3.stuck")
    assert 1.0 <= stuck["seconds"] < 30.0


def test_diff_names_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["conformance", "diff", "--backend", "cpu:native:eager", "--token-ids", "5", "9"]) == 0
    )
    assert "agree in float32" in capsys.readouterr().out


def test_diff_finds_what_was_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halyard.hal.kernels.native.kernels import NativeKernels

    honest = NativeKernels.attend

    def attend(self: Any, q: Any, k: Any, v: Any, pool: Any, layer: Any, batch: Any) -> Any:
        out = honest(self, q, k, v, pool, layer, batch)
        return out * 1.5 if layer.index == 3 else out

    monkeypatch.setattr(NativeKernels, "attend", attend)
    assert main(["conformance", "diff", "--backend", "cpu:native:eager"]) == 1
    assert "parts from reference at layer 3, attention" in capsys.readouterr().out
