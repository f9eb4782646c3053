"""`halyard conformance run | diff | accept | page`: prove a backend, or find where two part."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from halyard.hal.conformance.levels import LEVELS, MUTANTS
from halyard.hal.errors import BackendUnavailableError, ConfigError

__all__ = ["add_arguments", "run"]

_NAMES = [level.name for level in (*LEVELS, MUTANTS)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    prove = kinds.add_parser("run", help="run the suite on a backend")
    prove.add_argument("--backend", required=True, metavar="NAME",
                       help="a row of hw_matrix.yaml, or device:kernels:graph")  # fmt: skip
    prove.add_argument("--level", nargs="+", default=[], choices=_NAMES, metavar="LEVEL",
                       help=f"only these of {', '.join(_NAMES)}")  # fmt: skip
    prove.add_argument("--dtype", nargs="+", default=[], choices=["float32", "bfloat16", "float16"],
                       metavar="DTYPE", help="only these dtypes")  # fmt: skip
    prove.add_argument("--family", nargs="+", default=[], metavar="NAME",
                       help="of L4 only these model families")  # fmt: skip
    prove.add_argument("--case", nargs="+", default=[], metavar="ID", help="only these cells")
    prove.add_argument("--report", type=Path, metavar="DIR",
                       help="write results.json, junit.xml and index.html there")  # fmt: skip
    prove.add_argument("--matrix", type=Path, metavar="FILE", help="another hw_matrix.yaml")
    prove.add_argument("--jobs", type=int, default=1, metavar="N",
                       help="worker processes at a time (default 1)")  # fmt: skip
    prove.add_argument("--patience", type=float, default=1.0, metavar="FACTOR",
                       help="wait so many times longer before a cell has hung: for slow or busy "
                       "machines")  # fmt: skip
    prove.add_argument("--list", action="store_true", help="list the cells and run none")

    differ = kinds.add_parser("diff", help="where two backends part on one model and prompt")
    differ.add_argument("model", nargs="?", default="embedded", help="folder, hub id or 'embedded'")
    differ.add_argument("--backend", required=True, metavar="NAME")
    differ.add_argument("--against", default="reference", metavar="NAME")
    differ.add_argument("--prompt", default="def fibonacci(n):\n    ", help="text to run")
    differ.add_argument("--token-ids", type=int, nargs="+", metavar="ID", help="instead of a text")
    differ.add_argument("--dtype", default="auto",
                        choices=["auto", "float32", "bfloat16", "float16"])  # fmt: skip
    differ.add_argument("--matrix", type=Path, metavar="FILE", help="another hw_matrix.yaml")

    take = kinds.add_parser("accept", help="keep reports as evidence and set the matrix's status")
    take.add_argument("reports", nargs="+", type=Path, metavar="RESULTS.JSON")
    take.add_argument("--matrix", type=Path, metavar="FILE", help="another hw_matrix.yaml")

    page = kinds.add_parser("page", help="write DIR/index.html over DIR/*/results.json")
    page.add_argument("directory", type=Path, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    if args.kind == "run":
        return _run(args)
    if args.kind == "diff":
        from halyard.runtime.conformance.difference import compare

        found = compare(
            args.model, args.backend, args.against, prompt=args.prompt, token_ids=args.token_ids,
            dtype=args.dtype, matrix=args.matrix,
        )  # fmt: skip
        for line in found.lines():
            print(line)
        return 1 if found.first is not None else 0
    if args.kind == "accept":
        from halyard.hal.conformance.evidence import accept

        for line in accept(args.reports, args.matrix):
            print(line)
        return 0
    from halyard.hal.conformance.page import write_page

    print(write_page(args.directory))
    return 0


def _run(args: argparse.Namespace) -> int:
    from halyard.hal.conformance import results
    from halyard.hal.conformance.backend import find_backend
    from halyard.hal.conformance.case import collect
    from halyard.hal.conformance.page import write_page
    from halyard.hal.conformance.runner import Interrupted, run_cases

    backend = find_backend(args.backend, args.matrix)
    if backend.reasons:
        raise BackendUnavailableError(
            f"{backend.name} can't run here: {'; '.join(backend.reasons)}"
        )
    levels = tuple(args.level) or tuple({name.split(".")[0] for name in args.case})
    cases = collect(backend, levels)
    if args.dtype:
        cases = [case for case in cases if case.dtype is None or case.dtype in args.dtype]
    if args.family:
        families = {case.params.get("family") for case in collect(backend, ("L4",))}
        unknown = sorted(set(args.family) - families)
        if unknown:
            known = ", ".join(sorted(name for name in families if name))
            raise ConfigError(f"L4 has no family {', '.join(unknown)}: it has {known}")
        cases = [c for c in cases if c.level != "L4" or c.params["family"] in args.family]
    if args.case:
        unknown = sorted(set(args.case) - {case.id for case in cases})
        if unknown:
            raise ConfigError(f"no cell {', '.join(unknown)}: --list shows them")
        cases = [case for case in cases if case.id in args.case]
    if args.list:
        for case in cases:
            reasons = case.unclaimed(backend)
            print(case.id + (f"    not claimed: {'; '.join(reasons)}" if reasons else ""))
        return 0
    previous = None
    if args.report is not None:  # told now if it can't be written, not after the run
        old = results.folder_of(args.report, backend.name) / "results.json"
        previous = results.load(old) if old.is_file() else None
    started = time.perf_counter()
    show = _Progress(len(cases))
    interrupted = False
    try:
        found = run_cases(backend, cases, show, max(1, args.jobs), args.patience)
    except Interrupted as stopped:
        interrupted, found = True, stopped.results
    show.close()
    report = results.make(
        backend,
        found,
        asked={
            "levels": args.level,
            "dtypes": args.dtype,
            "families": args.family,
            "cases": args.case,
        },
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
        previous=previous,
    )
    _print(report)
    if interrupted:
        print(f"interrupted: {len(found)} of {len(cases)} cells have had their turn")
    if args.report is not None:
        print(f"report: {results.save(report, args.report)}")
        print(f"page:   {write_page(args.report)}")
    if interrupted:
        return 130
    return 0 if report["summary"]["ok"] else 1


class _Progress:
    """A bar on a terminal; bad cells are printed as they come, everywhere."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, desc="Proving", unit="cell", dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def __call__(self, result: dict[str, Any]) -> None:
        self._bar.update()
        if result["status"] in ("failed", "crashed", "hung"):
            self._bar.clear()
            print(f"{result['status'].upper():8} {result['id']}: {result['message']}", flush=True)

    def close(self) -> None:
        self._bar.close()


def _print(report: dict[str, Any]) -> None:
    summary = report["summary"]
    titles = {level.name: level.title for level in (*LEVELS, MUTANTS)}
    for name, counts in summary["levels"].items():
        told = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items())
        print(f"{name:<8} {titles[name]:<24} {told}")
    for dtype, worst in summary["worst"].items():
        print(
            f"{dtype:<8} worst error {worst['error']:.2e}, {worst['share']:.0%} of its limit "
            f"({worst['case']})"
        )
    if summary["kill_rate"] is not None:
        print(f"broken kernels noticed: {summary['kill_rate']:.0%}")
    verdict = "every claim holds" if summary["ok"] else "some claims do not hold"
    if not any(counts.get("passed") for counts in summary["levels"].values()) and summary["ok"]:
        verdict = "nothing of this is claimed"
    print(f"{report['backend']}: {verdict} ({report['seconds']:.0f} s)")
