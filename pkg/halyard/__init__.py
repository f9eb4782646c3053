"""Halyard serves large language models on whatever hardware there is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halyard.runtime.llm import LLM
    from halyard.runtime.outputs import CompletionOutput, RequestOutput
    from halyard.runtime.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "halyard.runtime.llm",
    "SamplingParams": "halyard.runtime.request",
    "RequestOutput": "halyard.runtime.outputs",
    "CompletionOutput": "halyard.runtime.outputs",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import halyard` stays light (no torch)."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'halyard' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
