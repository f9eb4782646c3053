"""Inductor's Triton backend: a unique segment becomes one artefact that launches kernels.

Python launches here, unlike the CPU's ahead-of-time libraries: a decode step is captured and replayed
whole, so that its launches cost nothing, and a prompt's are long. In return nothing needs a C++
compiler, a first start takes seconds, and the artefact on disk holds the compiled kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from halyard.hal.kernels.triton import skinny as _skinny  # noqa: F401 - stored segments call it

__all__ = ["Artefact", "compile_artefact", "load_artefact"]

_FILE = "segment.bin"


class Artefact:
    """A compiled segment: positional tensors in, a tuple of tensors out."""

    def __init__(self, compiled: Any, stored: Path | None = None) -> None:
        self._compiled = compiled
        self._stored = stored  # where it was loaded from

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._compiled(*inputs))

    def save(self, directory: Path) -> bool:
        """Write it to `directory`; False if this one can't be kept."""
        directory.mkdir(parents=True, exist_ok=True)
        try:
            if self._stored is not None:
                (directory / _FILE).write_bytes((self._stored / _FILE).read_bytes())
            else:
                self._compiled.save(path=str(directory / _FILE), format="binary")
        except (RuntimeError, AssertionError):  # something in the segment can't be serialised
            return False
        return True


def compile_artefact(segment: fx.GraphModule, inputs: Sequence[Tensor]) -> Artefact:
    """Compile for the device that the fake `inputs` live on; their sizes stay symbolic."""
    from torch._inductor import standalone_compile

    options = {
        "config_patches": {
            "triton.cudagraphs": False,  # the whole step is captured, not each segment
            "fx_graph_cache": True,
        }
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's own
        warnings.filterwarnings("ignore", message="TensorFloat32")  # fp32 is asked for: it is kept
        compiled = standalone_compile(
            segment, list(inputs), dynamic_shapes="from_graph", options=options
        )
    return Artefact(compiled)


def load_artefact(directory: Path) -> Artefact:
    """Read back what `save` wrote."""
    from torch._inductor.standalone_compile import CompiledArtifact

    loaded = CompiledArtifact.load(path=str(directory / _FILE), format="binary")
    return Artefact(loaded, directory)
