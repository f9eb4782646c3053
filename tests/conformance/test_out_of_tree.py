"""A backend that comes as a distribution of its own passes the suite and serves a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "slate:slate:eager"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The distribution as pip would leave it in site-packages: its package and its metadata."""
    site = tmp_path_factory.mktemp("site")
    source = ROOT / "tests" / "out_of_tree"
    (site / "halyard_slate").symlink_to(source / "halyard_slate")
    import tomllib

    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    info = site / f"halyard_slate-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: halyard-slate\nVersion: {project['version']}\n"
    )
    (info / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    return os.environ | {"PYTHONPATH": f"{ROOT / 'pkg'}{os.pathsep}{site}"}


def halyard(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "halyard.api.cli.main", *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip


def test_it_passes_the_suite(environment: dict[str, str]) -> None:
    done = halyard(environment, "conformance", "run", "--backend", BACKEND, "--dtype", "float32",
                   "--level", "L0", "L1", "L2", "L3", "mutants")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every claim holds" in done.stdout
    assert "broken kernels noticed: 100%" in done.stdout
    assert "not claimed" in done.stdout  # softcap and sinks are counted, not hidden


def test_it_serves_models_and_says_which_it_does_not(environment: dict[str, str]) -> None:
    done = halyard(environment, "conformance", "run", "--backend", BACKEND, "--case",
                   "L4.llama[float32]", "L4.gemma2[float32]", "L5.handed_over_and_back[float32]",
                   "L5.greedy_equals_reference[float32]")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "L4       models                   1 passed, 1 not claimed" in done.stdout
    assert "L5       engine                   2 passed" in done.stdout


def test_devices_lists_it(environment: dict[str, str]) -> None:
    done = halyard(environment, "devices")
    assert "Slate One" in done.stdout
