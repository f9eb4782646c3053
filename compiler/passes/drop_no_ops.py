"""Nodes that only pass a value on are removed: casts to the same dtype, products with one, checks.

Tracing leaves them behind; run node by node, each costs as much as real work on a few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from halyard.compiler.graph import ModelGraph

__all__ = ["drop_no_ops"]

_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default)
_PASS_ON = (_aten.dropout.default, _aten.contiguous.default, _aten.alias.default)


def drop_no_ops(graph: ModelGraph) -> None:
    """Replace each node that does nothing by its input."""
    fx_graph = graph.module.graph
    for node in list(fx_graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            fx_graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            fx_graph.erase_node(node)
    graph.clean()


def _does_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    same = (
        before.dtype == after.dtype
        and before.device == after.device
        and before.shape == after.shape
        and before.stride() == after.stride()
    )
    if not same:
        return False
    if node.target is _aten.mul.Tensor:
        return isinstance(node.args[1], float | int) and node.args[1] == 1
    if node.target is _aten.dropout.default:
        return node.args[2] is False
    return node.target in _CASTS or node.target in _PASS_ON
