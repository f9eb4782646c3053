"""Weights are stored once, in the order in which the CPU's linear kernel reads them.

A tied embedding is packed too: its rows are gathered from the packed form, so that the matrix is not
held twice.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.compiler.passes.linear_weights import linear_weights, replace_users
from halyard.hal.kernels.native.embedding import packed_embedding
from halyard.hal.kernels.native.linear import pack_linear, packed_linear

__all__ = ["prepack_linears"]


def prepack_linears(graph: ModelGraph) -> None:
    """Replace linears (and lookups in a tied embedding) by operators on packed weights."""
    for weight in linear_weights(graph, 2):
        _pack(graph, weight)
    graph.clean()


def _pack(graph: ModelGraph, weight: fx.Node) -> None:
    value = weight.meta["val"]
    out_features, in_features = (int(size) for size in value.shape)
    replace_users(
        graph,
        weight,
        lambda x, bias: (packed_linear, (x, weight, bias, out_features)),
        lambda ids: (packed_embedding, (ids, weight, in_features)),
    )
    name = weight.meta["weight"]
    graph.recipes[name] = replace(graph.recipes[name], packed=True)
    with value.fake_mode:
        weight.meta["val"] = pack_linear(value)
