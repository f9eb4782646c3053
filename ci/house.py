"""The house rules that no other tool checks. Prints `file:line: what is wrong`; exit status 1 if any.

Formatting, banned imports and broad excepts are ruff's, types mypy's, layers import-linter's.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "compiler", "hal", "models", "runtime")
MAX_LINES = 500  # a longer file hides a second noun
CONFIG_FILES = ("runtime/config.py", "hal/types.py", "hal/matrix.py")
ACCELERATOR_HOMES = ("hal/devices/", "hal/kernels/")
SCRIPTS = ("models/embedded/train.py",)  # run by hand, never while serving: no __all__, any device
ACCELERATOR = re.compile(r"\btorch\.(cuda|hip|xpu|mps)\b")
# Absolute paths of somebody's machine; the brackets keep this line from matching itself.
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:[h]ome|[r]oot|[U]sers|[w]ork)/\w")
BROAD_EXCEPT = re.compile(r"#\s*noqa:[^#]*\bBLE001\b(?P<why>.*)")
TEXT = {".py", ".md", ".yaml", ".toml", ".cpp", ".h", ".js", ".css", ".html", ".jinja", ""}

# They stay light: the scheduler runs without torch, and the command answers --help at once.
TORCH_FREE = (
    "halyard",
    "halyard.hal.contract",
    "halyard.hal.cpuinfo",
    "halyard.hal.errors",
    "halyard.hal.matrix",
    "halyard.hal.registry",
    "halyard.hal.selection",
    "halyard.hal.types",
    "halyard.runtime.answer",
    "halyard.runtime.block_pool",
    "halyard.runtime.config",
    "halyard.runtime.cost_model",
    "halyard.runtime.fair_queue",
    "halyard.runtime.intake",
    "halyard.runtime.kv_manager",
    "halyard.runtime.outputs",
    "halyard.runtime.plan",
    "halyard.runtime.request",
    "halyard.runtime.scheduler",
    "halyard.runtime.sequence",
    "halyard.api.cli.main",
    "halyard.api.cli.options",
    "halyard.api.cli.devices",
    # The server's process: torch is the engine's.
    "halyard.runtime.client",
    "halyard.runtime.process_port",
    "halyard.api.app",
    "halyard.api.loading",
    "halyard.api.server",
)


def is_ours(path: str) -> bool:
    """Python of the packages, not tests or scripts."""
    return path.endswith(".py") and path.split("/")[0] in FOLDERS


def check_text(path: str, text: str) -> Iterator[str]:
    """Rules on the lines of one file; `path` is relative to the root."""
    lines = text.splitlines()
    if is_ours(path) and len(lines) > MAX_LINES:
        yield f"{path}:{MAX_LINES}: {len(lines)} lines: split it, at most {MAX_LINES}"
    for number, line in enumerate(lines, 1):
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: a path of somebody's machine"
        if not is_ours(path):
            continue
        if ACCELERATOR.search(line) and not path.startswith((*ACCELERATOR_HOMES, *SCRIPTS)):
            yield f"{path}:{number}: accelerator calls belong below {' and '.join(ACCELERATOR_HOMES)}"
        broad = BROAD_EXCEPT.search(line)
        if broad and len(broad["why"].strip(" -:")) < 8:
            yield f"{path}:{number}: a broad except has to say why"


def check_module(path: str, text: str) -> Iterator[str]:
    """Rules on the syntax tree of one module of ours."""
    tree = ast.parse(text, path)
    if not ast.get_docstring(tree):
        yield f"{path}:1: no docstring says what this module is"
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    if len(tree.body) > 1 and "__all__" not in names and path not in SCRIPTS:
        yield f"{path}:1: no __all__"
    if path in CONFIG_FILES:
        yield from check_fields_are_explained(path, text)


def check_fields_are_explained(path: str, text: str) -> Iterator[str]:
    """Every dataclass has a docstring, and every field of a *Config says what it is for."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text, path)):
        if not isinstance(node, ast.ClassDef) or "dataclass" not in ast.dump(
            ast.Module(body=list(map(ast.Expr, node.decorator_list)), type_ignores=[])
        ):
            continue
        if not ast.get_docstring(node):
            yield f"{path}:{node.lineno}: {node.name} has no docstring"
        if not node.name.endswith("Config"):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign):
                continue
            own = lines[field.lineno - 1 : field.end_lineno]
            above = lines[field.lineno - 2].lstrip()
            if not above.startswith("#") and not any("#" in line for line in own):
                yield f"{path}:{field.lineno}: config field {ast.unparse(field.target)} has no comment"


def check_torch_free(modules: tuple[str, ...] = TORCH_FREE) -> Iterator[str]:
    """Import them in a fresh interpreter and look for torch."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        env={"PYTHONPATH": str(ROOT / "pkg"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        yield f"{done.stderr.strip().splitlines()[-1]}: importing it imports torch, or fails"


def tracked_files() -> list[str]:
    """What git knows; every file of an unpacked source archive."""
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    return [str(p.relative_to(ROOT)) for f in FOLDERS for p in (ROOT / f).rglob("*") if p.is_file()]


def main() -> int:
    complaints: list[str] = []
    for name in tracked_files():
        path = ROOT / name
        if path.suffix not in TEXT or path.is_symlink():
            continue
        text = path.read_text()
        complaints += check_text(name, text)
        if is_ours(name):
            complaints += check_module(name, text)
    complaints += check_torch_free()
    for complaint in complaints:
        print(complaint)
    print(f"house rules: {len(complaints)} broken" if complaints else "house rules: all kept")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
