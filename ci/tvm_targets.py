"""Generates the TVM kernels for every target that TVM has a code generator for, and reports.

Usage: python ci/tvm_targets.py [--json FILE] [--sources DIR] [--timeout S] [--target NAME ...]

Exits with 1 if a target's source could not be generated. "generated" means just that: the source
exists; nobody ran it.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pkg"))

from halyard.hal.kernels.tvm.emit import KERNELS, TARGETS, emit_source

# What a kernel is called in each target's language.
WORDS = {"cuda": "__global__", "rocm": ".amdhsa_kernel", "metal": "kernel void", "opencl": "__kernel",
         "webgpu": "@compute"}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--sources", type=Path, help="write the generated sources there")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one source")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    options = parser.parse_args()
    if find_spec("tvm") is None:
        print('needs TVM: pip install "halyard[tvm]"', file=sys.stderr)
        return 1
    cells = []
    for target in options.target or TARGETS:
        for dtype in TARGETS[target]:
            made = emit_source(target, dtype, options.timeout)
            status = made.status
            reason = made.reason
            if status == "generated" and made.kernels < len(KERNELS):
                status = "failed"
                reason = f"only {made.kernels} of {len(KERNELS)} kernels in the source"
            elif status == "generated" and made.source.count(WORDS[target]) < len(KERNELS):
                status, reason = "failed", f"{WORDS[target]} is not there for each kernel"
            cells.append(
                {
                    "target": target,
                    "dtype": dtype,
                    "status": status,
                    "reason": reason,
                    "seconds": round(made.seconds, 1),
                    "lines": made.source.count("\n"),
                }
            )
            if options.sources and made.source:
                options.sources.mkdir(parents=True, exist_ok=True)
                (options.sources / f"{target}-{dtype}.txt").write_text(made.source)
            print(f"{target:8} {dtype:9} {status:9} {made.seconds:5.1f} s  {reason}", flush=True)
    if options.json:
        versions = {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")}
        options.json.write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")
    return int(any(cell["status"] != "generated" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
