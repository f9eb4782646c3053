"""Compiles the CPU's kernels for 64-bit ARM and runs their tests on an emulated processor.

Usage: python ci/arm64/check.py [--level neon neonbf16] [--compiler aarch64-linux-gnu-g++]
       [--emulator qemu-aarch64] [--root /usr/aarch64-linux-gnu] [-- more arguments of pytest]

Right, not fast: an emulator says nothing about speed, and its threads see memory in this machine's
order, not in ARM's weaker one. Exit status 1 if a test fails; 2 if the tools are missing
(apt install g++-aarch64-linux-gnu qemu-user).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pkg"))

import pytest
from remote_library import RemoteLibrary, forget, recording

from halyard.hal.kernels.native import kernels, library, linear

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Level -> what `-cpu` of the emulator has it and nothing better.
LEVELS = {"neon": "cortex-a72", "neonbf16": "max"}
TESTS = ("test_kernels_contract.py", "test_packed_linear.py", "test_quantized_linear.py")


def build(compiler: str, level: str, target: Path) -> None:
    """The driver with the kernels in it."""
    flags = [flag for flag in library.BASE_FLAGS if flag != "-fPIC"]
    command = [compiler, *flags, *library.ISA_LEVELS[level][1], "-rdynamic", "-pthread", "-w",
               f"-I{library.SOURCES[0].parent}", str(HERE / "driver.cpp"),
               *map(str, library.SOURCES), "-ldl", "-o", str(target)]  # fmt: skip
    subprocess.run(command, check=True)


def run_tests(level: str, remote: RemoteLibrary, more: list[str]) -> int:
    """The native kernels' tests with every call sent to `remote`."""

    class Emulated:
        """Takes the places where this machine's library would be loaded."""

        def pytest_configure(self) -> None:
            for module in (library, kernels, linear):
                module.load_library = lambda _: remote  # type: ignore[attr-defined]
                module.best_isa = lambda _: level  # type: ignore[attr-defined]
                module.supported_isas = lambda _: (level,)  # type: ignore[attr-defined]
            linear.functions.cache_clear()

        def pytest_runtest_teardown(self) -> None:
            forget()

        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            left = ("reference", "every_isa_of_this_machine")  # they are not about `level`
            items[:] = [item for item in items if not any(word in item.name for word in left)]

    files = [str(ROOT / "tests" / "conformance" / name) for name in TESTS]
    # Halyard has a plugin of its own for pytest, and this program has imported it already.
    options = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with recording():
        return int(pytest.main([*options, *more, *files], plugins=[Emulated()]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--level", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--emulator", default="qemu-aarch64")
    parser.add_argument("--root", default="/usr/aarch64-linux-gnu", help="its C library")
    parser.add_argument("more", nargs="*", help="arguments of pytest")
    args = parser.parse_args()
    if missing := [one for one in (args.compiler, args.emulator) if shutil.which(one) is None]:
        print(f"no {' and no '.join(missing)}: apt install g++-aarch64-linux-gnu qemu-user")
        return 2
    if len(args.level) > 1:  # test modules know one level
        rest = [f"--{name}={getattr(args, name)}" for name in ("compiler", "emulator", "root")]
        commands = [
            [sys.executable, __file__, "--level", level, *rest, "--", *args.more]
            for level in args.level
        ]
        return max(subprocess.run(command, check=False).returncode for command in commands)
    [level] = args.level
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / "driver"
        build(args.compiler, level, driver)
        command = [args.emulator, "-cpu", LEVELS[level], "-L", args.root, str(driver)]
        remote = RemoteLibrary(command)
        status = run_tests(level, remote, args.more)
        remote.close()
    calls = ", ".join(f"{count} {name}" for name, count in sorted(remote.calls.items()))
    print(f"{level}: {'passed' if status == 0 else 'FAILED'}; calls: {calls}", flush=True)
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
