"""Builds the sdist, from it the wheel, installs that into an empty environment and tries it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "compiler", "hal", "models", "runtime")
# Ends of names that are data a running Halyard needs.
DATA = (".cpp", ".h", ".html", ".js", ".css", ".jinja", ".json", ".safetensors", ".yaml")
TRIES = (
    ["-c", "import halyard.hal.contract, halyard.runtime.scheduler, halyard.api.cli.main"],
    ["-c", "from halyard.hal.matrix import load_matrix; load_matrix()"],
    ["-m", "halyard.api.cli.main", "--version"],
    ["-m", "halyard.api.cli.main", "devices"],
)


def source_packages(root: Path = ROOT) -> set[str]:
    """Dotted names of all folders of ours that hold an __init__.py."""
    found = {"halyard"}
    for folder in FOLDERS:
        for file in (root / folder).rglob("__init__.py"):
            found.add(".".join(("halyard", *file.parent.relative_to(root).parts)))
    return found


def declared_packages(root: Path = ROOT) -> list[str]:
    """The package list of pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    packages: list[str] = settings["tool"]["setuptools"]["packages"]
    return packages


def needed_files(root: Path = ROOT) -> set[str]:
    """Names in the wheel of every module and every data file below our folders."""
    needed = {"halyard/__init__.py", "halyard/py.typed", "halyard/hw_matrix.yaml"}
    for folder in FOLDERS:
        for file in (root / folder).rglob("*"):
            if "__pycache__" in file.parts or not file.is_file():
                continue
            if file.suffix == ".py" or file.suffix in DATA:
                needed.add(f"halyard/{file.relative_to(root).as_posix()}")
    return needed


def build_wheel(out: Path, root: Path = ROOT) -> Path:
    """sdist -> wheel, in `out`. Raises CalledProcessError with the output shown."""
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
        done.check_returncode()
    (wheel,) = out.glob("*.whl")
    return wheel


def try_wheel(wheel: Path, folder: Path) -> None:
    """Install without dependencies (they come from this interpreter's) and run the commands."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True
    )
    own = next(Path(path) for path in python_paths(python))
    # addsitedir would also run this environment's own .pth files, the editable install's among
    # them; plain lines only add the folders, behind the wheel's.
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HALYARD_MATRIX")}
    where = subprocess.run(
        [python, "-c", "import halyard; print(halyard.__file__)"],
        cwd=folder, env=environment, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    if not Path(where).resolve().is_relative_to(folder.resolve()):
        raise SystemExit(f"packaging: the wheel is not what gets imported, but {where}")
    for command in TRIES:
        subprocess.run([python, *command], cwd=folder, env=environment, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    subprocess.run([folder / "bin" / "halyard", "--version"], env=environment, check=True)


def python_paths(python: Path) -> list[str]:
    """site-packages of another interpreter."""
    code = "import site; print('\\n'.join(site.getsitepackages()))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


def main() -> int:
    if set(declared_packages()) != source_packages():
        wrong = sorted(set(declared_packages()) ^ source_packages())
        print(f"packaging: pyproject's packages differ from the folders: {', '.join(wrong)}")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build_wheel(folder)
        with zipfile.ZipFile(wheel) as archive:
            missing = needed_files() - set(archive.namelist())
        if missing:
            print(f"packaging: not in the wheel: {', '.join(sorted(missing))}")
            return 1
        try_wheel(wheel, folder / "environment")
        print(f"packaging: {wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB, installs and runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
