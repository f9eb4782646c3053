"""An ONNX graph while it is being written: nodes, constants, inputs and outputs by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["NUMPY_DTYPES", "OPSET", "OnnxGraph", "numpy_dtype", "onnx_dtype"]

OPSET = 20  # the first with Gelu: any runtime since 2024 reads it
_IR_VERSION = 9  # the one that came with the opset, so that older runtimes read the file

NUMPY_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.bool: np.bool_,
}


def numpy_dtype(dtype: torch.dtype) -> Any:
    """numpy's type of a torch dtype; TypeError for those that numpy lacks (bfloat16)."""
    if dtype not in NUMPY_DTYPES:
        raise TypeError(f"{dtype} has no counterpart in numpy")
    return NUMPY_DTYPES[dtype]


def onnx_dtype(dtype: torch.dtype) -> int:
    """ONNX's number of a torch dtype."""
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(numpy_dtype(dtype))))


class OnnxGraph:
    """Collects nodes in order. Values are names; a subgraph may read the names of its parent."""

    def __init__(self, parent: OnnxGraph | None = None) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._root: OnnxGraph = parent._root if parent is not None else self
        self._count = 0

    def name(self, stem: str) -> str:
        """A name that nothing else has."""
        self._root._count += 1
        return f"{stem}_{self._root._count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; returns its name. An empty input name means: left out."""
        return self.ops(kind, *inputs, num_outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, num_outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        from onnx import helper

        stem = kind.lower()
        outputs = [self.name(stem) for _ in range(num_outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, outputs[0], **attributes))
        return outputs

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A constant; equal ones are one."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(np.asarray(value, dtype=dtype)).reshape(np.shape(value))
        root = self._root
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in root._constants:
            name = self.name("constant")
            root.initializers.append(numpy_helper.from_array(array, name))
            root._constants[key] = name
        return root._constants[key]

    def add_input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        """An input; a dimension is a number or a name."""
        self.inputs.append(_value(name, dtype, shape))
        return name

    def add_output(
        self, value: str, name: str, dtype: torch.dtype, shape: Sequence[int | str]
    ) -> None:
        """Hand `value` out under `name`. Values that a node here made are renamed, not copied."""
        from onnx import helper

        made_here = any(value in node.output for node in self.nodes)
        if made_here and value not in {output.name for output in self.outputs}:
            _rename(self.nodes, value, name)
        else:
            self.nodes.append(helper.make_node("Identity", [value], [name], f"output_{name}"))
        self.outputs.append(_value(name, dtype, shape))

    def body(self, name: str) -> Any:
        """The graph as onnx's GraphProto, without nodes whose outputs nobody reads."""
        from onnx import helper

        read = {output.name for output in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if read.intersection(node.output):
                read.update(_reads(node))
                kept.append(node)
        return helper.make_graph(kept[::-1], name, self.inputs, self.outputs, self.initializers)

    def model(self, name: str) -> Any:
        """The graph as onnx's ModelProto; domains other than ONNX's own are there in version 1."""
        from onnx import helper

        body = self.body(name)
        domains = sorted({node.domain for node in body.node} - {""})
        return helper.make_model(
            body,
            opset_imports=[
                helper.make_opsetid("", OPSET),
                *(helper.make_opsetid(domain, 1) for domain in domains),
            ],
            ir_version=_IR_VERSION,
            producer_name="halyard",
        )


def _value(name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, onnx_dtype(dtype), list(shape))


def _reads(node: Any) -> set[str]:
    """Names that a node reads, those that its subgraphs read from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                names |= _reads(inner)
            names.update(output.name for output in attribute.g.output)
    return names


def _rename(nodes: Any, old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, old, new)
