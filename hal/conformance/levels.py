"""The levels, and where each one's cases come from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LEVELS", "MUTANTS", "Level"]


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the suite. `provider` is "module:function", called with a BackendUnderTest."""

    name: str
    title: str
    provider: str


LEVELS: tuple[Level, ...] = (
    Level("L0", "device and memory", "halyard.hal.conformance.l0_device:cases"),
    Level("L1", "graph compilers", "halyard.compiler.conformance:cases"),
    Level("L2", "KV blocks", "halyard.hal.conformance.l2_blocks:cases"),
    Level("L3", "attention", "halyard.hal.conformance.l3_attention:cases"),
    Level("L4", "models", "halyard.runtime.conformance.l4_models:cases"),
    Level("L5", "engine", "halyard.runtime.conformance.l5_engine:cases"),
    Level("L6", "HTTP surface", "halyard.api.conformance:cases"),
)

# Not a level of the backend but of the suite: broken kernels that it has to notice.
MUTANTS = Level("mutants", "broken kernels noticed", "halyard.hal.conformance.mutants:cases")
