"""One cell of the suite: what it is called, what it claims, and what it is given to run with."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from halyard.hal.conformance.levels import LEVELS, MUTANTS, Level
from halyard.hal.errors import HalyardError
from halyard.hal.types import DType, Requirements

if TYPE_CHECKING:
    from halyard.hal.conformance.backend import BackendUnderTest
    from halyard.hal.contract import Device, GraphCompiler, PagedKernels

__all__ = ["Case", "CaseContext", "NonconformanceError", "collect"]


class NonconformanceError(HalyardError):
    """A backend does not do what the contract, or its own capabilities, say."""


@dataclass(frozen=True, slots=True)
class Case:
    """A cell. `run` raises NonconformanceError, or anything else, if the backend fails it."""

    level: str
    name: str  # "decode.gqa": unique in its level and dtype
    run: Callable[[CaseContext], None]
    dtype: DType | None = None
    need: Requirements | None = None  # what has to be claimed for the cell to count
    params: dict[str, Any] = field(default_factory=dict)
    seconds: float = 120.0  # it hangs if it takes longer
    quick: bool = False  # small enough to be run against every mutant
    waived: tuple[str, ...] = ()  # why it is not claimed, beside what `need` finds missing

    @property
    def id(self) -> str:
        return f"{self.level}.{self.name}" + (f"[{self.dtype}]" if self.dtype else "")

    def unclaimed(self, backend: BackendUnderTest) -> list[str]:
        """Why the backend doesn't claim this cell; empty if it does."""
        reasons = list(self.waived)
        if self.dtype is not None and self.dtype not in backend.row.dtypes:
            reasons.append(f"dtype {self.dtype} (the row has {', '.join(backend.row.dtypes)})")
        if self.need is not None and backend.capabilities is not None:
            reasons += backend.capabilities.missing(self.need)
        return list(dict.fromkeys(reasons))


@dataclass(slots=True)
class CaseContext:
    """What a case runs with. Errors are measured through `check`, so that the report has them."""

    case: Case
    backend: BackendUnderTest
    device: Device
    kernels: PagedKernels
    compiler: GraphCompiler
    error: float | None = None  # worst, by its share of the limit
    limit: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # figures that are told, not judged

    @property
    def dtype(self) -> DType:
        if self.case.dtype is None:
            raise AssertionError(f"{self.case.id} has no dtype")
        return self.case.dtype

    def check(self, error: float, limit: float, what: str) -> None:
        """Record a measured error; raise if it is over its limit or no number."""
        bad = math.isnan(error) or error > limit
        if self.limit is None or bad or error * self.limit > (self.error or 0.0) * limit:
            self.error, self.limit = error, limit
        if bad:
            raise NonconformanceError(f"{what}: error {error:.3g}, at most {limit:.3g} is allowed")

    def require(self, ok: bool, text: str) -> None:
        """Raise if something that must hold doesn't."""
        if not ok:
            raise NonconformanceError(text)


def collect(backend: BackendUnderTest, levels: tuple[str, ...] = ()) -> list[Case]:
    """All cases of the levels asked for (none: all of them, mutants included), in order."""
    found: list[Case] = []
    for level in (*LEVELS, MUTANTS):
        if not levels or level.name in levels:
            found += _provide(level, backend)
    ids = [case.id for case in found]
    if len(set(ids)) != len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        raise AssertionError(f"cases share an id: {', '.join(twice)}")
    return found


def _provide(level: Level, backend: BackendUnderTest) -> list[Case]:
    module, _, function = level.provider.partition(":")
    provided: list[Case] = getattr(importlib.import_module(module), function)(backend)
    return provided
