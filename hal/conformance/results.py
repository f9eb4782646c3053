"""What a run leaves behind: results.json (a versioned schema) and JUnit's XML."""

from __future__ import annotations

import json
import platform
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import halyard
from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.levels import LEVELS, MUTANTS
from halyard.hal.errors import ConfigError
from halyard.hal.registry import load_part

__all__ = [
    "BAD",
    "SCHEMA",
    "STATUSES",
    "changes",
    "folder_of",
    "junit",
    "load",
    "make",
    "save",
    "summary",
]

SCHEMA = 1
STATUSES = ("passed", "failed", "crashed", "hung", "not_claimed")
BAD = ("failed", "crashed", "hung")
Report = dict[str, Any]


def make(
    backend: BackendUnderTest,
    results: Sequence[dict[str, Any]],
    *,
    seconds: float,
    asked: Mapping[str, Sequence[str]] | None = None,
    interrupted: bool = False,
    previous: Report | None = None,
) -> Report:
    """The report of one run.

    Args:
        asked: kind ("levels", "dtypes", "families", "cases") -> what of it; none: everything.
        interrupted: the run was ended before all cells had their turn.
        previous: the last run's report, for the differences.
    """
    row = backend.row
    report: Report = {
        "schema": SCHEMA,
        "backend": row.name,
        "parts": {"device": row.device, "kernels": row.kernels, "graph": row.graph},
        "row_dtypes": list(row.dtypes),
        "asked": {kind: list(names) for kind, names in (asked or {}).items()},
        "interrupted": interrupted,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "device": asdict(backend.info) if backend.info else None,
        "versions": {
            "halyard": halyard.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
            **backend.versions(),
        },
        "digest": backend.digest(),
        "capabilities": asdict(backend.capabilities) if backend.capabilities else None,
        "fallbacks": _fallbacks(backend),
        "command": f"halyard conformance run --backend {row.name}",
        "results": list(results),
    }
    report["summary"] = summary(report)
    report["changes"] = changes(previous, report) if previous else []
    return report


def _fallbacks(backend: BackendUnderTest) -> list[str]:
    """What the parts say they do in another way than one would hope here."""
    found: list[str] = []
    for axis, name in (("devices", backend.row.device), ("kernels", backend.row.kernels),
                       ("graphs", backend.row.graph)):  # fmt: skip
        tell = getattr(load_part(axis, name), "fallbacks", None)
        if tell is not None and backend.info is not None:
            found += tell(backend.info)
    return found


def split_id(case_id: str) -> tuple[str, str, str]:
    """(level, name, dtype or "") of a case's id."""
    level, _, rest = case_id.partition(".")
    name, _, dtype = rest.partition("[")
    return level, name, dtype.rstrip("]")


def summary(report: Report) -> dict[str, Any]:
    """Counts by level, the worst error's share of its limit by dtype, and the kill rate."""
    levels: dict[str, Counter[str]] = {level.name: Counter() for level in (*LEVELS, MUTANTS)}
    worst: dict[str, dict[str, Any]] = {}
    for result in report["results"]:
        level, _, dtype = split_id(result["id"])
        levels[level][result["status"]] += 1
        error, limit = result["error"], result["limit"]
        if dtype and error is not None and limit and level != MUTANTS.name:
            share = error / limit if error == error else float("inf")
            if share >= worst.get(dtype, {"share": -1.0})["share"]:
                worst[dtype] = {
                    "share": share, "error": error, "limit": limit, "case": result["id"]
                }  # fmt: skip
    mutants = levels[MUTANTS.name]
    tried = sum(mutants[status] for status in ("passed", *BAD))
    return {
        "levels": {name: dict(counts) for name, counts in levels.items() if counts},
        "worst": worst,
        "kill_rate": mutants["passed"] / tried if tried else None,
        "ok": not any(counts[status] for counts in levels.values() for status in BAD),
    }


def changes(before: Report, after: Report) -> list[dict[str, str]]:
    """Cases whose status differs from the last run's."""
    old = {result["id"]: result["status"] for result in before["results"]}
    return [
        {"id": result["id"], "before": old.get(result["id"], "absent"), "after": result["status"]}
        for result in after["results"]
        if old.get(result["id"], "absent") != result["status"]
    ]


def folder_of(directory: Path, backend: str) -> Path:
    """DIRECTORY/<backend>, made if it isn't there.

    Raises:
        ConfigError: nothing can be written there.
    """
    folder = directory / backend.replace(":", "-")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"can't write the report to {folder}: {error.strerror}") from error
    return folder


def save(report: Report, directory: Path) -> Path:
    """Write DIRECTORY/<backend>/results.json and junit.xml; the path of the first."""
    folder = folder_of(directory, report["backend"])
    try:
        file = folder / "results.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "junit.xml").write_text(junit(report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write the report to {folder}: {error.strerror}") from error
    return file


def load(file: Path) -> Report:
    """Read a results.json.

    Raises:
        ConfigError: it isn't one, or of another schema.
    """
    try:
        report: Report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is no conformance report: {error}") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ConfigError(f"{file} is no conformance report of schema {SCHEMA}")
    return report


def junit(report: Report) -> str:
    """The report as JUnit XML: crashed and hung are errors, not claimed is skipped and says why."""
    suites = ElementTree.Element("testsuites", name=f"halyard conformance: {report['backend']}")
    for level in (*LEVELS, MUTANTS):
        own = [r for r in report["results"] if split_id(r["id"])[0] == level.name]
        if not own:
            continue
        count = Counter(result["status"] for result in own)
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=f"{level.name} {level.title}",
            tests=str(len(own)),
            failures=str(count["failed"]),
            errors=str(count["crashed"] + count["hung"]),
            skipped=str(count["not_claimed"]),
            time=f"{sum(result['seconds'] for result in own):.3f}",
        )
        for result in own:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{report['backend']}.{level.name}",
                name=result["id"],
                time=f"{result['seconds']:.3f}",
            )
            kind = {"failed": "failure", "crashed": "error", "hung": "error",
                    "not_claimed": "skipped"}.get(result["status"])  # fmt: skip
            if kind:
                text = f"{result['status']}: {result['message']}"
                ElementTree.SubElement(case, kind, message=text).text = result["detail"] or None
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
