"""One segment as an ONNX model, with what a caller must know to bind its inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from halyard.compiler.graphs.onnx_graph import OnnxGraph
from halyard.compiler.graphs.onnx_translate import Translator
from halyard.hal.errors import ModelError

__all__ = ["segment_model"]


def segment_model(segment: fx.GraphModule) -> tuple[Any, dict[str, Any]]:
    """Translate a segment.

    Returns:
        The ModelProto, and facts in JSON's types: "weights", the positions of inputs that are
        weights; "outputs", each with name, dtype and shape, a dimension being a size or
        [input, dimension] of the input that has it.
    """
    graph = OnnxGraph()
    translator = Translator(graph)
    sources: dict[str, list[int]] = {}  # a symbol -> [input, dimension] that shows it
    weights: list[int] = []
    outputs: list[dict[str, Any]] = []
    position = 0
    for node in segment.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                raise ModelError("ONNX graphs can't take a size as an input of a segment")
            if "weight" in node.meta:
                weights.append(position)
            stem = "w" if "weight" in node.meta else "x"
            shape = _shape(value)
            for dim, size in enumerate(shape):
                if isinstance(size, str):
                    sources.setdefault(size, [position, dim])
            translator.values[node] = graph.add_input(f"{stem}{position}", value.dtype, shape)
            position += 1
        elif node.op == "call_function":
            translator.node(node)
        elif node.op == "output":
            for number, made in enumerate(node.args[0]):
                value = made.meta["val"]
                shape = _shape(value)
                name = f"y{number}"
                graph.add_output(translator.tensor(made), name, value.dtype, shape)
                for size in shape:
                    if isinstance(size, str) and size not in sources:
                        raise ModelError(f"an output of a segment has the unknown size {size}")
                outputs.append(
                    {
                        "name": name,
                        "dtype": str(value.dtype).removeprefix("torch."),
                        "shape": [sources[d] if isinstance(d, str) else d for d in shape],
                    }
                )
        else:
            raise ModelError(f"ONNX graphs can't hold a node of kind {node.op}")
    return graph.model("segment"), {"weights": weights, "outputs": outputs}


def _shape(value: torch.Tensor) -> list[int | str]:
    return [size if isinstance(size, int) else str(size) for size in value.shape]
