"""Transcendental functions as plain arithmetic, so that LLVM vectorises them: its own are calls."""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - TVM's own convention

__all__ = ["LOG2E", "fast_exp2", "fast_tanh"]

LOG2E = math.log2(math.e)
_EXP2 = [math.log(2) ** n / math.factorial(n) for n in range(8)]  # |x| <= 1/2: error below 1e-8
# Cephes' polynomial for |x| < 0.625, where 1 - 2 / (e^2x + 1) would cancel.
_TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)


def _float(value: float) -> Any:
    return T.float32(value)


def fast_exp2(x: Any) -> Any:
    """2 ** x in fp32 to about 1e-7; exactly 0 below -126."""
    x_in = T.min(T.max(x, _float(-126.0)), _float(127.0))
    whole = T.floor(x_in + _float(0.5))
    rest = x_in - whole
    value = _float(_EXP2[-1])
    for factor in reversed(_EXP2[:-1]):
        value = value * rest + _float(factor)
    power = T.reinterpret("float32", (T.Cast("int32", whole) + T.int32(127)) << T.int32(23))
    return T.Select(x < _float(-126.0), _float(0.0), value * power)


def fast_tanh(x: Any) -> Any:
    """tanh(x) in fp32 to about 2e-7."""
    square = x * x
    small = _float(_TANH[0])
    for factor in _TANH[1:]:
        small = small * square + _float(factor)
    small = small * square * x + x
    wide = T.min(T.max(x, _float(-10.0)), _float(10.0))
    large = _float(1.0) - _float(2.0) / (fast_exp2(wide * _float(2 * LOG2E)) + _float(1.0))
    return T.Select(T.abs(x) < _float(0.625), small, large)
