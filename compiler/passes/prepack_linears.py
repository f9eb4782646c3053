"""Weights are stored once, in the order in which the CPU's linear kernel reads them.

A tied embedding is packed too: its rows are gathered from the packed form, so that the matrix is not
held twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.hal.kernels.native.embedding import packed_embedding
from halyard.hal.kernels.native.linear import pack_linear, packed_linear

__all__ = ["prepack_linears"]

_LINEAR = torch.ops.aten.linear.default
_EMBEDDING = torch.ops.aten.embedding.default
_DTYPES = (torch.float32, torch.bfloat16)


def prepack_linears(graph: ModelGraph) -> None:
    """Replace linears (and lookups in a tied embedding) by operators on packed weights."""
    for weight in [node for node in graph.module.graph.nodes if graph.weight_of(node)]:
        users = list(weight.users)
        if _packable(weight, users) and any(user.target is _LINEAR for user in users):
            for user in users:
                _replace(graph, weight, user)
            name = weight.meta["weight"]
            value = weight.meta["val"]
            graph.recipes[name] = replace(graph.recipes[name], packed=True)
            with value.fake_mode:
                weight.meta["val"] = pack_linear(value)
    graph.clean()


def _packable(weight: fx.Node, users: list[fx.Node]) -> bool:
    value = weight.meta["val"]
    if value.dim() != 2 or value.dtype not in _DTYPES or value.shape[1] % 2:
        return False
    for user in users:
        is_linear = user.target is _LINEAR and user.args[1] is weight
        plain_lookup = user.target is _EMBEDDING and user.args[0] is weight
        if not (is_linear or plain_lookup):
            return False
        if is_linear and user.args[0].meta["val"].dtype != value.dtype:  # type: ignore[union-attr]
            return False
    return True


def _replace(graph: ModelGraph, weight: fx.Node, user: fx.Node) -> None:
    out_features, in_features = (int(size) for size in weight.meta["val"].shape)
    fx_graph = graph.module.graph
    with fx_graph.inserting_before(user):
        if user.target is _LINEAR:
            bias = user.args[2] if len(user.args) > 2 else None
            new = fx_graph.call_function(packed_linear, (user.args[0], weight, bias, out_features))
        else:
            new = fx_graph.call_function(packed_embedding, (user.args[1], weight, in_features))
    new.meta.update(user.meta)
    user.replace_all_uses_with(new)
    fx_graph.erase_node(user)
