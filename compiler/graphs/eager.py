"""No compiler: the graph runs node by node. Works everywhere, and is what others are checked by.

A segment is kept as the Python that it runs as, so a second start traces nothing here either:
seconds, for a model of some layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, fx

from halyard.hal.contract import CONTRACT_VERSION, Executable
from halyard.hal.types import DeviceInfo, Probe

__all__ = ["EagerCompiler"]

_FILE = "segment.py"
_NAMES = """\
import torch
from math import inf, nan
from torch import device

NoneType = type(None)

"""  # that torch.fx writes into its code without saying where they are from
_KNOWN = frozenset({"torch", "inf", "nan", "device", "NoneType"})
_TREES = frozenset({"fx_pytree", "pytree"})  # among the names always, used where inputs are trees


class _Segment:
    """The Python of a segment's graph, run. Tensors in by position, a tuple of tensors out."""

    def __init__(self, source: str) -> None:
        self.source = source
        names: dict[str, Any] = {}
        exec(compile(source, _FILE, "exec"), names)  # a graph's code, here or in an earlier start
        self._forward = names["forward"]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self._forward(None, *inputs)
        return outputs


class EagerCompiler:
    """Runs the segment's own generated Python."""

    contract_version = CONTRACT_VERSION
    name = "eager"

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        return Probe(True)

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        return ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input")

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        source = _source(segment)
        return segment.forward if source is None else _Segment(source)

    def save(self, executable: Executable, directory: Path) -> bool:
        if not isinstance(executable, _Segment):
            return False
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _FILE).write_text(executable.source)
        return True

    def load(self, directory: Path, device: DeviceInfo) -> Executable:
        source = (directory / _FILE).read_text()
        if "torch.ops.halyard." in source:
            # Registers what a pass writes into quantized graphs; the pass is not run now.
            import halyard.hal.kernels.native.quantized_linear  # noqa: F401
        return _Segment(source)


def _source(segment: fx.GraphModule) -> str | None:
    """What the segment runs as; None: it holds more than a text can, as another graph."""
    if any(node.op in ("call_module", "get_attr") for node in segment.graph.nodes):
        return None
    code = segment.graph.python_code("self")
    imports = []
    for name, value in code.globals.items():
        if name in _KNOWN or (name in _TREES and f"{name}." not in code.src):
            continue
        if not isinstance(value, ModuleType):
            return None
        imports.append(f"import {value.__name__} as {name}\n")
    return "".join((*imports, _NAMES, code.src))
