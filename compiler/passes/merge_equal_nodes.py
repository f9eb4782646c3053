"""Equal computations are done once.

Every layer of a traced model derives the same views of the rotary tables anew; merged, the first
segment hands on two tensors instead of two a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.hal import ops

__all__ = ["merge_equal_nodes"]


def merge_equal_nodes(graph: ModelGraph) -> None:
    """Replace each node by the first with the same operator and arguments, if it is pure."""
    fx_graph = graph.module.graph
    seen: dict[tuple[object, ...], fx.Node] = {}
    for node in list(fx_graph.nodes):
        if not _is_pure(node):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            fx_graph.erase_node(node)
    graph.clean()


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is ops.paged_attention or node.is_impure():
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    return torch.Tag.nondeterministic_seeded not in tags and not node.target._schema.is_mutable


def _frozen(value: Any) -> object:
    """A hashable form in which 1, 1.0 and True differ."""
    if isinstance(value, tuple | list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    return (type(value).__name__, value)
