"""Inductor's Triton backend: a unique segment becomes one artefact that launches kernels.

Python launches here, unlike the CPU's ahead-of-time libraries: a decode step is captured and replayed
whole, so that its launches cost nothing, and a prompt's are long. In return nothing needs a C++
compiler, a first start takes seconds, and the artefact on disk holds the compiled kernels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from halyard.hal.kernels.triton import gated as _gated  # noqa: F401 - stored segments call it
from halyard.hal.kernels.triton import largest as _largest  # noqa: F401 - and this
from halyard.hal.kernels.triton import rotary as _rotary  # noqa: F401 - and this
from halyard.hal.kernels.triton.skinny import linear_add, linear_add_  # and these

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
    segment = add_in_place(segment)
    with torch.no_grad(), _alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's own
        warnings.filterwarnings("ignore", message="TensorFloat32")  # fp32 is asked for: it is kept
        compiled = standalone_compile(
            segment, list(inputs), dynamic_shapes="from_graph", options=options
        )
    return Artefact(compiled)


def _alone() -> AbstractContextManager[None]:
    """A few kernels: they are done before a pool of processes has started, which would outlive us."""
    from torch._inductor import config

    alone: AbstractContextManager[None] = config.patch(compile_threads=1)
    return alone


def add_in_place(segment: fx.GraphModule) -> fx.GraphModule:
    """Let sums take the place of what they are added to, where nobody reads that any more.

    A segment changes inputs only that were given to it for good (`donated`).
    """
    segment = copy.deepcopy(segment)
    nodes = list(segment.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    outputs = nodes[-1].all_input_nodes
    for node in [node for node in nodes if node.target is linear_add]:
        residual, x, weight = node.args
        others = [user for user in residual.users if user is not node]
        if (
            residual in outputs
            or not _owned(residual)
            or any(place[user] > place[node] or _may_alias(user) for user in others)
        ):
            continue
        with segment.graph.inserting_before(node):
            place[segment.graph.call_function(linear_add_, (residual, x, weight))] = place[node]
        node.replace_all_uses_with(residual)
        segment.graph.erase_node(node)
        outputs = nodes[-1].all_input_nodes
    segment.graph.lint()
    segment.recompile()
    return segment


def _owned(node: fx.Node) -> bool:
    """Memory of its own, laid out in order, that this segment may write to."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_contiguous():
        return False
    if node.op == "placeholder":
        return bool(node.meta.get("donated"))
    return not _may_alias(node)


def _may_alias(node: fx.Node) -> bool:
    """Whether its result may be a view of what it reads."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target is torch.ops.aten.to.dtype:  # a copy, unless it changes nothing
        source = node.all_input_nodes[0].meta.get("val")
        value = node.meta.get("val")
        if isinstance(source, torch.Tensor) and isinstance(value, torch.Tensor):
            return source.dtype == value.dtype
    return any(result.alias_info is not None for result in node.target._schema.returns)


def load_artefact(directory: Path) -> Artefact:
    """Read back what `save` wrote."""
    from torch._inductor.standalone_compile import CompiledArtifact

    with _alone():
        loaded = CompiledArtifact.load(path=str(directory / _FILE), format="binary")
    return Artefact(loaded, directory)
