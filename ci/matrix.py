"""Expands hw_matrix.yaml into the lanes that CI runs on a machine without a GPU; ci/lanes.py runs them.

python ci/matrix.py            one line of JSON, for a workflow's matrix: {"include": [{"lane": ...}]}
python ci/matrix.py --all      every row: its lane, or why it has none here

A row that can run here gets a lane of the conformance suite. A row that only compiles gets a lane
that compiles it for every target. What a lane leaves out of the suite is proven elsewhere in the same
CI run, or is too slow for each change; the reports behind hw_matrix.yaml are always of whole runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pkg"))

from halyard.hal.matrix import BackendRow, load_matrix
from halyard.hal.selection import probe_backend

# What a lane runs of the suite; rows that aren't here run all of it. Compiling is what takes long,
# and tests/golden has engines and models of every family on these kernels already.
_PARTS: dict[str, tuple[str, ...]] = {
    # L0, L2, L3 and the mutants of these two are tests/conformance/test_suite.py.
    "reference": ("--dtype", "float32", "--level", "L1", "L6"),
    "cpu-eager": ("--dtype", "bfloat16", "--level", "L4", "--family", "llama", "gemma2"),
    # Every segment costs seconds of a C++ compiler. Llama is tests/golden/test_program_inductor.py.
    "cpu": ("--dtype", "float32", "--level", "L0", "L1", "L4", "L5", "L6", "--family", "mixtral"),
    "onnx": ("--level", "L1", "L4", "L6", "--family", "llama", "gemma2"),
    # The graphs are those of cpu; an engine on its own graphs is tests/golden/test_program_tvm.py.
    "tvm": ("--dtype", "float32", "--level", "L0", "L2", "L3", "L6", "mutants"),
    # A step at a time in Python.
    "triton-interpreter": ("--dtype", "float32", "--level", "L0", "L2", "L3", "L4", "mutants",
                           "--family", "llama"),
}  # fmt: skip

# Rows that nobody can run here: kernels -> what compiles them for their targets.
_AHEAD: dict[str, tuple[str, ...]] = {
    "triton": ("ci/triton_targets.py", "--dtypes", "bfloat16", "--dims", "128"),
    "tvm": ("ci/tvm_targets.py", "--timeout", "600"),  # beside the tests it waits for most of that
}

# Tests that need what only the lanes install: here they run, once.
_TESTS = {
    "tests-tvm": ("tests/conformance/test_tvm_kernels.py", "tests/conformance/test_tvm_targets.py",
                  "tests/conformance/test_tvm_gpu_source.py", "tests/golden/test_program_tvm.py"),
    "tests-triton": ("tests/conformance/test_triton_interpreter.py",
                     "tests/conformance/test_triton_targets.py",
                     "tests/conformance/test_triton_ahead.py",
                     "tests/conformance/test_triton_launches.py",
                     "tests/conformance/test_rehearsed_kernels.py",
                     "tests/conformance/test_hopper_prefill.py",
                     "tests/conformance/test_hopper_wide.py",
                     "tests/conformance/test_hopper_shared.py",
                     "tests/conformance/test_hopper_linear.py"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lane:
    """One thing that CI runs: `python ARGUMENTS` in the checkout's root."""

    lane: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def lanes(matrix_path: Path | None = None) -> list[Lane]:
    """All lanes of this machine, in the order of the matrix, then the tests'."""
    found: dict[str, Lane] = {}
    for row in load_matrix(matrix_path).rows:
        lane = _lane(row)
        if lane is not None:
            found.setdefault(lane.lane, lane)
    for name, files in _TESTS.items():
        found[name] = Lane(name, ("-m", "pytest", "-p", "no:cacheprovider", *files))
    if all(shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64")):
        # Small ones alone: the others are most of an emulator's time.
        small = "not long_context and not 1024-640 and not 600-1000 and not 576-1000"
        found["arm64"] = Lane("arm64", ("ci/arm64/check.py", "--", "-k", small))
    return list(found.values())


def _lane(row: BackendRow) -> Lane | None:
    if row.kernels == "null":
        return None  # it computes nothing; the tests run on it
    if _runs_here(row):
        run = ("-m", "halyard.api.cli.main", "conformance", "run", "--backend", row.name,
               "--patience", "4")  # fmt: skip
        return Lane(row.name, (*run, *_PARTS.get(row.name, ())), _environment(row))
    if row.kernels in _AHEAD:
        return Lane(f"{row.kernels}-targets", _AHEAD[row.kernels])
    return None


def _environment(row: BackendRow) -> dict[str, str]:
    """The interpreter is asked for before Triton is imported."""
    return {"TRITON_INTERPRET": "1"} if (row.device, row.kernels) == ("cpu", "triton") else {}


def _runs_here(row: BackendRow) -> bool:
    reasons = probe_backend(row).reasons
    # The one reason that the lane itself removes.
    return all("set TRITON_INTERPRET=1" in reason for reason in reasons)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--matrix", type=Path, help="another hw_matrix.yaml")
    parser.add_argument(
        "--all", action="store_true", help="every row, and why one has no lane here"
    )
    args = parser.parse_args()
    if args.all:
        for row in load_matrix(args.matrix).rows:
            lane = _lane(row)
            told = "; ".join(probe_backend(row).reasons)
            print(f"{row.name:<20} {f'lane {lane.lane}' if lane else 'no lane'}  {told}".rstrip())
        return 0
    print(json.dumps({"include": [asdict(lane) for lane in lanes(args.matrix)]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
