"""hw_matrix.yaml's status column, written from reports by this module and never by hand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from halyard.hal.conformance.levels import LEVELS
from halyard.hal.conformance.results import load
from halyard.hal.errors import ConfigError
from halyard.hal.matrix import BackendRow, Matrix, load_matrix

__all__ = ["REPORTS", "accept", "status_from", "unproven"]

REPORTS = Path("hal/conformance/reports")  # beside hw_matrix.yaml, in a checkout and in a wheel


def unproven(report: dict[str, Any], row: BackendRow) -> list[str]:
    """Why a report does not make its row `verified`; empty if it does."""
    summary, reasons = report["summary"], []
    parts = {"device": row.device, "kernels": row.kernels, "graph": row.graph}
    if report["parts"] != parts:
        reasons.append("it is about other parts")
    if report.get("interrupted") or any(report["asked"].values()):
        reasons.append("only a part of the suite was run")
    if not summary["ok"]:
        reasons.append("some claimed cells did not pass")
    missing = [
        level.name for level in LEVELS if not summary["levels"].get(level.name, {}).get("passed")
    ]
    if missing and row.kernels != "null":
        reasons.append(f"no passed cell at {', '.join(missing)}")
    if summary["kill_rate"] not in (1.0, None) or (
        summary["kill_rate"] is None and row.kernels != "null"
    ):
        reasons.append("not every broken kernel was noticed")
    for dtype in row.dtypes:
        seen = any(
            r["status"] == "passed" and r["id"].startswith("L5.") and r["id"].endswith(f"[{dtype}]")
            for r in report["results"]
        )
        if not seen and row.kernels != "null":
            reasons.append(f"the engine was not run in {dtype}")
    return reasons


def status_from(report: dict[str, Any], row: BackendRow) -> str:
    """The status that a report earns its row."""
    return "untested" if unproven(report, row) else "verified"


def accept(files: list[Path], matrix: Path | None = None) -> list[str]:
    """Copy reports into the tree and set the status of their rows; one line a report.

    Raises:
        ConfigError: a report can't be read, or names no row of the matrix.
    """
    told = []
    for file in files:
        report = load(file)
        found = load_matrix(matrix)
        row = found.row(report["backend"])
        if row.line == 0:
            raise ConfigError(f"{file}: backend {row.name!r} has no row in {found.path.name}")
        status = status_from(report, row)
        home = found.path.resolve().parent / REPORTS / row.name
        home.mkdir(parents=True, exist_ok=True)
        if file.resolve() != (home / "results.json").resolve():
            shutil.copyfile(file, home / "results.json")
        evidence = f"{REPORTS.as_posix()}/{row.name}/results.json"
        _set(found, row, status, evidence)
        reasons = unproven(report, row)
        told.append(f"{row.name}: {status}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return told


def _set(matrix: Matrix, row: BackendRow, status: str, evidence: str) -> None:
    """Rewrite two lines of one row; every other byte of the file stays."""
    path = matrix.path.resolve()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    start = row.line - 1
    indent = " " * (len(lines[start]) - len(lines[start].lstrip()) + 2)
    stop = start + 1
    while stop < len(lines) and lines[stop].startswith(indent):
        stop += 1
    own = [line for line in lines[start:stop] if not re.match(rf"{indent}evidence:", line)]
    for number, line in enumerate(own):
        if re.match(rf"{indent}status:", line):
            own[number] = f"{indent}status: {status}\n{indent}evidence: {evidence}\n"
    lines[start:stop] = own
    path.write_text("".join(lines), encoding="utf-8")
