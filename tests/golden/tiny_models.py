"""The tiny models, under the name that tests import them by."""

from halyard.models.tiny import (
    FAMILIES,
    MOE_FAMILIES,
    PROVEN,
    SERVED,
    save_tiny_model,
    tiny_config,
    tiny_model,
)

__all__ = [
    "FAMILIES",
    "MOE_FAMILIES",
    "PROVEN",
    "SERVED",
    "save_tiny_model",
    "tiny_config",
    "tiny_model",
]
