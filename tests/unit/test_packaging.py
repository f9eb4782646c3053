"""What an installation consists of: packages, links, data files and entry points."""

import importlib
import importlib.util
import os
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("api", "compiler", "hal", "models", "runtime")

_spec = importlib.util.spec_from_file_location("ci_packaging", ROOT / "ci" / "packaging.py")
assert _spec is not None
assert _spec.loader is not None
packaging = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packaging)


def test_the_package_list_equals_the_folders():
    declared = packaging.declared_packages()
    assert len(declared) == len(set(declared))
    assert set(declared) == packaging.source_packages()


def test_a_folder_without_init_is_not_a_package(tmp_path):
    for folder in ("hal/new", "runtime"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "hal/new/__init__.py").touch()
    assert packaging.source_packages(tmp_path) == {"halyard", "halyard.hal.new"}


@pytest.mark.parametrize("name", [*FOLDERS, "hw_matrix.yaml"])
def test_links_are_relative_and_lead_home(name):
    link = ROOT / "pkg" / "halyard" / name
    assert link.is_symlink()
    assert not os.path.isabs(os.readlink(link))
    assert link.resolve() == (ROOT / name).resolve()


def test_every_data_file_is_matched_by_a_glob():
    table = SETTINGS["tool"]["setuptools"]["package-data"]
    covered = set()
    for package, globs in table.items():
        base = ROOT / "pkg" / "halyard" if package == "halyard" else ROOT.joinpath(
            *package.split(".")[1:]
        )  # fmt: skip
        for glob in globs:
            covered |= {file.resolve() for file in base.glob(glob)}
    for name in packaging.needed_files():
        file = (ROOT / "pkg" / name).resolve()
        assert file.suffix == ".py" or file in covered, f"{name} would be missing from a wheel"


def test_entry_points_are_the_built_in_parts():
    from halyard.hal import registry

    points = SETTINGS["project"]["entry-points"]
    assert {name.removeprefix("halyard.") for name in points} == {*registry.AXES, "pytest11"}
    for axis in registry.AXES:
        assert points[f"halyard.{axis}"] == registry._BUILT_IN[axis]
        for target in points[f"halyard.{axis}"].values():
            module, _, attribute = target.partition(":")
            assert hasattr(importlib.import_module(module), attribute)


def test_no_registry_host_in_the_tree():
    for name in ("pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text.replace("http://127.0.0.1", ""), name


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert SETTINGS["project"]["license"] == "Apache-2.0"
