"""Translation of `halyard::experts`: a loop over the experts that the tokens at hand chose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from halyard.compiler.graphs.onnx_graph import OnnxGraph, numpy_dtype
from halyard.compiler.graphs.onnx_translate import Translator, argument, handler, result
from halyard.hal.errors import ModelError
from halyard.hal.kernels.experts import SWIGLUOAI, Gate

__all__: list[str] = []


@handler("halyard.experts.default")
def _experts(t: Translator, node: fx.Node) -> str:
    """Arguments as hal/kernels/experts.py has them."""
    from onnx import helper

    dtype = result(node).dtype
    hidden, gate_up, down, ids = (t.tensor(arg) for arg in node.args[:4])
    weights = t.tensor(node.args[4], dtype)
    gate = Gate(
        str(node.args[5]), argument(node, 9, "interleaved", False), argument(node, 10, "alpha", 1.0),
        argument(node, 11, "limit", 0.0),
    )  # fmt: skip
    biases = [argument(node, 6, "gate_up_bias"), argument(node, 7, "down_bias")]
    transposed = argument(node, 8, "transposed", False)
    size = int(result(node.args[0]).shape[1])
    flat = t.op("Reshape", ids, t.ints([-1]))
    chosen = t.graph.ops("Unique", flat, num_outputs=1, sorted=1)[0]
    count = t.op("Squeeze", t.op("Shape", chosen), t.ints([0]))
    start = t.op("Expand", t.tensor(0.0, dtype), t.op("Shape", hidden))

    body = OnnxGraph(t.graph)
    number = body.add_input(body.name("number"), torch.int64, [])
    going = body.add_input(body.name("going"), torch.bool, [])
    total = body.add_input(body.name("total"), dtype, ["tokens", size])
    expert = body.op("Gather", chosen, number, axis=0)

    def product(rows: str, matrices: str, bias: fx.Node | None) -> str:
        inputs = [rows, body.op("Gather", matrices, expert, axis=0)]
        if bias is not None:
            inputs.append(body.op("Gather", t.tensor(bias), expert, axis=0))
        return body.op("Gemm", *inputs, transB=int(not transposed))

    # [2, pairs]: which token, and its how-manieth choice this expert is
    where = body.op("NonZero", body.op("Equal", ids, expert))
    tokens = body.op("Gather", where, body.constant(0), axis=0)
    both = product(body.op("Gather", hidden, tokens, axis=0), gate_up, biases[0])
    width = int(result(node.args[2]).shape[1 if transposed else 2])
    made = product(_gated(body, both, gate, width, numpy_dtype(dtype)), down, biases[1])
    pairs = body.op("Transpose", where, perm=[1, 0])
    scale = body.op("Unsqueeze", body.op("GatherND", weights, pairs), body.constant([1]))
    targets = body.op("Unsqueeze", tokens, body.constant([1]))
    summed = body.op("ScatterND", total, targets, body.op("Mul", made, scale), reduction="add")
    body.add_output(going, body.name("going_on"), torch.bool, [])
    body.add_output(summed, body.name("summed"), dtype, ["tokens", size])

    # It may be left out, but ONNX's own evaluator never loops then.
    always = t.graph.constant(True, np.bool_)
    output = t.graph.name("experts")
    t.graph.nodes.append(
        helper.make_node("Loop", [count, always, start], [output], output, body=body.body("expert"))
    )
    return output


def _gated(body: OnnxGraph, both: str, gate_of: Gate, width: int, dtype: Any) -> str:
    """As hal/kernels/experts.py `gated`: [pairs, 2 * width] -> [pairs, width]."""
    if gate_of.interleaved:
        turns = body.op("Reshape", both, body.constant([-1, width, 2]))
        gate, up = (body.op("Gather", turns, body.constant(at), axis=2) for at in (0, 1))
    else:
        gate, up = body.ops("Split", both, body.constant([width, width]), num_outputs=2, axis=1)
    if gate_of.limit > 0:
        most = body.constant(gate_of.limit, dtype)
        gate = body.op("Min", gate, most)
        up = body.op("Clip", up, body.constant(-gate_of.limit, dtype), most)
    if gate_of.activation == SWIGLUOAI:
        slope = body.op("Sigmoid", body.op("Mul", gate, body.constant(gate_of.alpha, dtype)))
        more = body.op("Add", up, body.constant(1.0, dtype))
        return body.op("Mul", more, body.op("Mul", gate, slope))
    if gate_of.activation == "silu":
        return body.op("Mul", up, body.op("Mul", gate, body.op("Sigmoid", gate)))
    if gate_of.activation == "relu":
        return body.op("Mul", up, body.op("Relu", gate))
    if gate_of.activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if gate_of.activation == "gelu_tanh" else "none"
        return body.op("Mul", up, body.op("Gelu", gate, approximate=approximate))
    raise ModelError(f"ONNX graphs can't hold experts with the activation {gate_of.activation} yet")
