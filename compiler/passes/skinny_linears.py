"""Linears become halyard::skinny_linear, which has kernels of its own for a few rows on a GPU.

Weights stay as they are. Not among the passes of a graph compiler until it is measured to pay.
"""

from __future__ import annotations

import torch

from halyard.compiler.graph import ModelGraph
from halyard.hal.kernels.triton.skinny import skinny_linear

__all__ = ["skinny_linears"]

_LINEAR = torch.ops.aten.linear.default
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def skinny_linears(graph: ModelGraph) -> None:
    """Replace linears whose weight is a model's own and of the dtype of what it multiplies."""
    fx_graph = graph.module.graph
    for node in [node for node in fx_graph.nodes if node.target is _LINEAR]:
        x, weight, *rest = node.args
        if not graph.weight_of(weight):
            continue
        value = weight.meta["val"]
        if value.dim() != 2 or value.dtype not in _DTYPES or x.meta["val"].dtype != value.dtype:
            continue
        with fx_graph.inserting_before(node):
            new = fx_graph.call_function(skinny_linear, (x, weight, rest[0] if rest else None))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        fx_graph.erase_node(node)
    graph.clean()
