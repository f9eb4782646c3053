"""Weights of linears become 8 or 4 bits each, with a scale for a group of inputs.

A tied embedding is quantised too and its rows widened as they are looked up, so that the matrix is
held once. It has the bits of the others: 8 instead of 4 gained 0.001 of the 0.017 nats a token that 4
cost the embedded model, and the head is a fifth of what a step of a 1b model reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.compiler.passes.linear_weights import linear_weights, replace_users
from halyard.hal.kernels.native.quantized_linear import (
    GROUP,
    quantize_linear,
    quantized_embedding,
    quantized_linear,
)

__all__ = ["quantize_linears_int4", "quantize_linears_int8"]


def quantize_linears_int8(graph: ModelGraph) -> None:
    """Replace linears, and lookups in what linears read too, by operators on 8 bits."""
    _quantize(graph, 8)


def quantize_linears_int4(graph: ModelGraph) -> None:
    """The same with 4 bits."""
    _quantize(graph, 4)


def _quantize(graph: ModelGraph, bits: int) -> None:
    for weight in linear_weights(graph, GROUP):
        _narrow(graph, weight, bits)
    graph.clean()


def _narrow(graph: ModelGraph, weight: fx.Node, bits: int) -> None:
    value = weight.meta["val"]
    out_features, in_features = (int(size) for size in value.shape)
    is_bfloat16 = value.dtype == torch.bfloat16
    replace_users(
        graph,
        weight,
        lambda x, bias: (quantized_linear, (x, weight, bias, out_features, bits)),
        lambda ids: (quantized_embedding, (ids, weight, in_features, bits, is_bfloat16)),
    )
    name = weight.meta["weight"]
    graph.recipes[name] = replace(graph.recipes[name], bits=bits)
    with value.fake_mode:
        weight.meta["val"] = quantize_linear(value, bits=bits)
