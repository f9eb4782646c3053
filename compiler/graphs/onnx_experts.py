"""Translation of `halyard::experts`: a loop over the experts that the tokens at hand chose."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halyard.compiler.graphs.onnx_graph import OnnxGraph
from halyard.compiler.graphs.onnx_translate import Translator, handler, result
from halyard.hal.errors import ModelError

__all__: list[str] = []


@handler("halyard.experts.default")
def _experts(t: Translator, node: fx.Node) -> str:
    """hidden [tokens, h], gate_up [e, 2w, h], down [e, h, w], ids and weights [tokens, k]."""
    from onnx import helper

    dtype = result(node).dtype
    hidden, gate_up, down, ids = (t.tensor(arg) for arg in node.args[:4])
    weights, activation = t.tensor(node.args[4], dtype), node.args[5]
    width = int(result(node.args[2]).shape[2])
    size = int(result(node.args[1]).shape[2])
    flat = t.op("Reshape", ids, t.ints([-1]))
    chosen = t.graph.ops("Unique", flat, num_outputs=1, sorted=1)[0]
    count = t.op("Squeeze", t.op("Shape", chosen), t.ints([0]))
    start = t.op("Expand", t.tensor(0.0, dtype), t.op("Shape", hidden))

    body = OnnxGraph(t.graph)
    number = body.add_input(body.name("number"), torch.int64, [])
    going = body.add_input(body.name("going"), torch.bool, [])
    total = body.add_input(body.name("total"), dtype, ["tokens", size])
    expert = body.op("Gather", chosen, number, axis=0)
    # [2, pairs]: which token, and its how-manieth choice this expert is
    where = body.op("NonZero", body.op("Equal", ids, expert))
    tokens = body.op("Gather", where, body.constant(0), axis=0)
    rows = body.op("Gather", hidden, tokens, axis=0)
    both = body.op("Gemm", rows, body.op("Gather", gate_up, expert, axis=0), transB=1)
    gate, up = body.ops("Split", both, body.constant([width, width]), num_outputs=2, axis=1)
    inner = body.op("Mul", _activate(body, gate, activation), up)
    made = body.op("Gemm", inner, body.op("Gather", down, expert, axis=0), transB=1)
    pairs = body.op("Transpose", where, perm=[1, 0])
    scale = body.op("Unsqueeze", body.op("GatherND", weights, pairs), body.constant([1]))
    targets = body.op("Unsqueeze", tokens, body.constant([1]))
    summed = body.op("ScatterND", total, targets, body.op("Mul", made, scale), reduction="add")
    body.add_output(going, body.name("going_on"), torch.bool, [])
    body.add_output(summed, body.name("summed"), dtype, ["tokens", size])

    output = t.graph.name("experts")
    t.graph.nodes.append(
        helper.make_node("Loop", [count, "", start], [output], output, body=body.body("expert"))
    )
    return output


def _activate(body: OnnxGraph, gate: str, activation: Any) -> str:
    if activation == "silu":
        return body.op("Mul", gate, body.op("Sigmoid", gate))
    if activation in ("gelu", "relu"):
        return body.op({"gelu": "Gelu", "relu": "Relu"}[activation], gate)
    raise ModelError(f"ONNX graphs can't hold experts with the activation {activation} yet")
