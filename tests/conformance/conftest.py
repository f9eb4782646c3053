"""Fixtures of tests on what a machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native import linear
from halyard.hal.kernels.native.library import supported_isas


@pytest.fixture(params=supported_isas(CpuDevice().info.features))
def each_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The native linears of every ISA level that this machine runs, in turn."""
    monkeypatch.setenv("HALYARD_NATIVE_ISA", request.param)
    linear.functions.cache_clear()
    yield
    linear.functions.cache_clear()
