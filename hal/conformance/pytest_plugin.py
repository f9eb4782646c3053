"""pytest's way in: `pytest --pyargs halyard.hal.conformance --backend NAME`. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

__all__ = ["pytest_addoption", "pytest_generate_tests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("halyard", "Halyard's conformance suite")
    group.addoption("--backend", help="the backend that is to be proven: a row of hw_matrix.yaml, "
                    "or device:kernels:graph")  # fmt: skip
    group.addoption("--level", action="append", default=[], help="only this level; may be repeated")
    group.addoption("--matrix", help="another hw_matrix.yaml")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "conformance_case" not in metafunc.fixturenames:
        return
    from pathlib import Path

    import pytest

    from halyard.hal.conformance.backend import find_backend
    from halyard.hal.conformance.case import collect
    from halyard.hal.errors import ConfigError

    name = metafunc.config.getoption("--backend")
    if not name:
        metafunc.parametrize("conformance_case", [])
        return
    matrix = metafunc.config.getoption("--matrix")
    try:
        backend = find_backend(name, Path(matrix) if matrix else None)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error
    if backend.reasons:
        raise pytest.UsageError(f"{name} can't run here: {'; '.join(backend.reasons)}")
    cases = collect(backend, tuple(metafunc.config.getoption("--level")))
    metafunc.parametrize(
        "conformance_case", [(backend, case) for case in cases], ids=[case.id for case in cases]
    )
