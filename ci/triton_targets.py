"""Compile every Triton kernel for every GPU it claims, on a machine without any.

Usage: python ci/triton_targets.py [--targets gfx942,sm_90] [--dtypes bfloat16] [--json FILE]

One line a kernel; exit status 1 if one doesn't compile, needs more shared memory than its target
has, spills registers or has no matrix instructions. Shows nothing about numerics or speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from halyard.hal.kernels.triton.targets import (
    HEAD_DIMS,
    KERNELS,
    TARGETS,
    CompileReport,
    compile_variant,
    variants,
)


def told(report: CompileReport) -> str:
    """A report as one line."""
    matrix = ", ".join(f"{count} {name.split('.')[0]}" for name, count in report.matrix.items())
    return (
        f"{report.variant!s:42} {report.tile:27} {report.shared / 1024:6.1f} of "
        f"{report.shared_limit // 1024:3} KiB  {report.registers:3} registers  "
        f"{report.spills:3} spilled  {matrix[:60]}"
    )


def table(rows: list[dict[str, Any]], version: str) -> str:
    """What each target's kernels need at most, kernel by kernel; rows as --json writes them."""
    lines = [
        f"Triton {version}: every kernel, dtype and head dim, compiled ahead of time.",
        "shared: the most that one variant needs, of what the target has; spilled: 4-byte registers of a",
        "thread, at most, in 16-bit dtypes and in fp32.",
        "",
        f"{'target':8} {'kernel':16} {'variants':>8} {'wrong':>6} {'shared':>16} {'registers':>9} "
        f"{'spilled':>8} {'fp32':>6}  matrix instructions",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"]["target"], row["variant"]["kernel"]), []).append(row)
    for (target, kernel), own in groups.items():
        done = [row for row in own if "shared" in row]
        spills = {
            wide: max((r["spills"] for r in done if (r["variant"]["dtype"] == "float32") == wide),
                      default=0)
            for wide in (False, True)
        }  # fmt: skip
        names = sorted({name.split(".")[0] for row in done for name in row["matrix"]})
        shared = max((row["shared"] for row in done), default=0)
        limit = max((row["shared_limit"] for row in done), default=0)
        registers = max((row["registers"] for row in done), default=0)
        wrong = sum(bool(row["problems"]) for row in own)
        lines.append(
            f"{target:8} {kernel:16} {len(own):8} {wrong:6} {shared / 1024:6.1f} of {limit // 1024:3} KiB "
            f"{registers:9} {spills[False]:8} {spills[True]:6}  {', '.join(names) or '-'}"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--dims", default=",".join(map(str, HEAD_DIMS)))
    parser.add_argument("--json", metavar="FILE", help="write all reports there")
    parser.add_argument("--table", metavar="FILE", help="write a summary there")
    options = parser.parse_args()
    import triton

    started, rows, bad = time.perf_counter(), [], 0
    chosen: Any = variants(
        tuple(options.targets.split(",")),
        tuple(options.kernels.split(",")),
        tuple(options.dtypes.split(",")),
        tuple(map(int, options.dims.split(","))),
    )
    for variant in chosen:
        try:
            report = compile_variant(variant)
        except Exception as error:  # noqa: BLE001 - a compiler may raise anything: one red line each
            problems = [f"does not compile: {' '.join(str(error).split())[-200:]}"]
            rows.append({"variant": asdict(variant), "problems": problems})
            line = str(variant)
        else:
            problems = report.problems()
            rows.append(asdict(report) | {"problems": problems})
            line = told(report)
        bad += bool(problems)
        print(line + "".join(f"  WRONG: {problem}" for problem in problems), flush=True)
    took = time.perf_counter() - started
    print(f"triton {triton.__version__}: {len(rows)} kernels, {bad} wrong, {took:.0f} s")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"triton": triton.__version__, "kernels": rows}, file, indent=1)
    if options.table:
        with open(options.table, "w", encoding="utf-8") as file:
            file.write(table(rows, triton.__version__))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
