"""What the contract's types refuse."""

from __future__ import annotations

import math

import pytest

from halyard.hal.types import AttentionLayer


@pytest.mark.parametrize("scale", [0.0, -0.125, math.nan])
def test_a_scale_is_positive(scale: float) -> None:
    """The largest score stays the largest when it is scaled: kernels rely on it."""
    with pytest.raises(ValueError, match="layer 3: scale must be positive"):
        AttentionLayer(3, 4, 2, 64, scale)
