"""Weights of linears become 8 or 4 bits each, with a scale for a group of inputs.

A tied embedding is left alone: lookups read it too.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halyard.compiler.graph import ModelGraph
from halyard.hal.kernels.native.quantized_linear import (
    GROUPS,
    quantize_linear,
    quantized_linear,
)

__all__ = ["quantize_linears_int4", "quantize_linears_int8"]

_LINEAR = torch.ops.aten.linear.default
_DTYPES = (torch.float32, torch.bfloat16)


def quantize_linears_int8(graph: ModelGraph) -> None:
    """Replace linears whose weight nobody else reads."""
    _quantize(graph, 8)


def quantize_linears_int4(graph: ModelGraph) -> None:
    """Replace linears whose weight nobody else reads."""
    _quantize(graph, 4)


def _quantize(graph: ModelGraph, bits: int) -> None:
    fx_graph = graph.module.graph
    for node in [node for node in fx_graph.nodes if node.target is _LINEAR]:
        weight = node.args[1]
        if not graph.weight_of(weight) or len(weight.users) != 1:
            continue
        value, x = weight.meta["val"], node.args[0].meta["val"]
        if value.dim() != 2 or value.dtype not in _DTYPES or x.dtype != value.dtype:
            continue
        if value.shape[1] % GROUPS[bits]:
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        args = (node.args[0], weight, bias, int(value.shape[0]), bits)
        with fx_graph.inserting_before(node):
            new = fx_graph.call_function(quantized_linear, args)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        fx_graph.erase_node(node)
        name = weight.meta["weight"]
        graph.recipes[name] = replace(graph.recipes[name], bits=bits)
        with value.fake_mode:
            weight.meta["val"] = quantize_linear(value, bits)
    graph.clean()
