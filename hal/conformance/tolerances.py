"""How far a result may be from the truth. Every limit of the suite comes from here.

The yardstick is the error of plain torch in the same dtype against fp64 on the same inputs: a
backend may be FACTOR times as far off, plus the rounding of the result itself, plus what rounding
the sums of the scores may do (all kernels sum in fp32, each in its own order; an error in a score is
a relative error of its weight). So a limit knows about long rows and large scores without a table of
special cases.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FACTOR", "LOGITS", "OVERRIDES", "Override", "limit_for"]

# Other orders of summation, another exp: in practice 1 to 2.
FACTOR: dict[str, float] = {"float32": 4.0, "bfloat16": 3.0, "float16": 3.0}

# Half a unit in the last place, relative: the error of rounding a result once.
_ROUNDING: dict[str, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}

# Softmax weights may be rounded to the dtype before they multiply values: once more, both ways.
_ROUNDINGS = 4

_SUM_ROUNDING = 2.0 * 2.0**-24  # of a sum in fp32, relative to the sum of magnitudes

# Logits of the tiny models against Hugging Face in fp32, absolute: what the project promises.
LOGITS = 1e-4


@dataclass(frozen=True, slots=True)
class Override:
    """A wider limit for one backend and operation. It needs a reason and a link that says more."""

    backend: str
    operation: str  # a case's name without its dtype, or a prefix of it
    dtype: str
    factor: float  # instead of FACTOR
    reason: str
    link: str


OVERRIDES: tuple[Override, ...] = ()


def limit_for(
    dtype: str,
    honest: float,
    magnitude: float,
    condition: float = 0.0,
    backend: str = "",
    operation: str = "",
) -> float:
    """The largest absolute error allowed.

    Args:
        honest: max abs error of plain torch in `dtype` on the same inputs.
        magnitude: max abs value of the true result.
        condition: largest sum of magnitudes behind one score, sum |scale * q_i * k_i|.
    """
    factor = FACTOR[dtype]
    for override in OVERRIDES:
        if (override.backend, override.dtype) == (backend, dtype) and operation.startswith(
            override.operation
        ):
            factor = override.factor
    rounding = _ROUNDINGS * _ROUNDING[dtype] + _SUM_ROUNDING * condition
    return factor * honest + rounding * max(magnitude, 1.0)
