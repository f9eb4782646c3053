"""Quantised weights: where they are refused."""

from __future__ import annotations

import pytest

from halyard.hal.errors import ConfigError
from halyard.runtime.config import EngineConfig
from halyard.runtime.planner import make_plan


@pytest.mark.parametrize("backend", ["cpu-eager", "null", "cpu:tvm:inductor"])
def test_other_backends_refuse(backend: str) -> None:
    """The matrix doesn't say that they can."""
    if "tvm" in backend:
        pytest.importorskip("tvm", reason='needs pip install "halyard[tvm]"')
    with pytest.raises(ConfigError, match="has no int8 weights: use backend cpu, or"):
        make_plan(EngineConfig(model="embedded", backend=backend, quantization="int8"))


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="none, int8 or int4"):
        EngineConfig(model="embedded", quantization="int3")
