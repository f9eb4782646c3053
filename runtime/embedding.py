"""From what a model pooled to the vector that a user gets. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halyard.hal.errors import RequestError

__all__ = ["check_dimensions", "finish_embedding"]


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raise RequestError unless an embedding can be cut to that length."""
    if dimensions is not None and not 1 <= dimensions <= hidden_size:
        raise RequestError(
            f"dimensions must be between 1 and {hidden_size}, got {dimensions}", "dimensions"
        )


def finish_embedding(
    pooled: bytes, dimensions: int | None = None, normalize: bool = True
) -> NDArray[np.float32]:
    """Cut to the first `dimensions` entries, then scale to length one, as OpenAI does.

    Args:
        pooled: float32 [hidden], a TokenEvent's embedding.
    """
    vector = np.frombuffer(pooled, "<f4")[:dimensions].astype(np.float64)
    if normalize:
        length = np.linalg.norm(vector)
        vector = vector / length if length else vector
    return vector.astype(np.float32)
