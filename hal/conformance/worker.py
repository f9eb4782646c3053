"""Runs cases in a process of its own and tells, line by line, what came of each.

    python -m halyard.hal.conformance.worker FD     <- {"backend", "matrix", "cases": [ids]} on stdin

Lines of JSON on file descriptor FD: {"start": id} before a case, then its result. Whatever a case
or a library prints goes elsewhere, and if the process dies the reader knows in which case.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from halyard.hal.conformance.backend import BackendUnderTest, find_backend
from halyard.hal.conformance.case import Case, CaseContext, NonconformanceError, collect
from halyard.hal.registry import load_part

__all__ = ["main", "open_parts", "run_case"]


def open_parts(backend: BackendUnderTest) -> tuple[Any, Any, Any]:
    """The backend's device, kernels and graph compiler, made anew."""
    row = backend.row
    device = load_part("devices", row.device)()
    return device, load_part("kernels", row.kernels)(device), load_part("graphs", row.graph)()


def run_case(case: Case, backend: BackendUnderTest, parts: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Run one case here; what the report keeps of it."""
    context = CaseContext(case, backend, *parts)
    started = time.perf_counter()
    status, message, detail = "passed", "", ""
    try:
        case.run(context)
    except NonconformanceError as error:
        status, message = "failed", str(error)
    except Exception as error:  # noqa: BLE001 - a backend may raise anything: the cell is red
        status = "failed"
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        detail = "".join(traceback.format_exception(error)[-6:])
    return {
        "id": case.id,
        "status": status,
        "seconds": round(time.perf_counter() - started, 4),
        "error": context.error,
        "limit": context.limit,
        "message": message,
        "detail": detail,
        "notes": context.notes,
    }


def _end_with(parent: int) -> None:
    """Kill our session, servers that a case has started included, when the runner has died."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    if os.getpid() == os.getsid(0):  # as the runner starts it
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job = json.load(sys.stdin)
    out = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    matrix = Path(job["matrix"]) if job["matrix"] else None
    backend = find_backend(job["backend"], matrix)
    wanted = job["cases"]
    levels = tuple(dict.fromkeys(name.split(".")[0] for name in wanted))
    known = {case.id: case for case in collect(backend, levels)}
    parts = open_parts(backend)
    for name in wanted:
        out.write(json.dumps({"start": name}) + "\n")
        out.write(json.dumps(run_case(known[name], backend, parts)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
