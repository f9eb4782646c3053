"""Fixtures of tests on what a machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native import library, linear


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # When tests are collected, not when this is read: ci/arm64/check.py says meanwhile what there is.
    if "each_isa" in metafunc.fixturenames:
        levels = library.supported_isas(CpuDevice().info.features)
        metafunc.parametrize("each_isa", levels, indirect=True)


@pytest.fixture
def each_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The native linears of every ISA level that this machine runs, in turn."""
    monkeypatch.setenv("HALYARD_NATIVE_ISA", request.param)
    linear.functions.cache_clear()
    yield
    linear.functions.cache_clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
