"""halyard::experts becomes halyard::expert_parts and sums of its own.

What follows a mixture of experts adds its result to the residual stream and norms that: a graph compiler
takes the sums in there, where a kernel of their own would write and read once more.
"""

from __future__ import annotations

import torch

from halyard.compiler.graph import ModelGraph
from halyard.hal.kernels.experts import expert_parts, experts

__all__ = ["experts_apart"]

_aten = torch.ops.aten


def experts_apart(graph: ModelGraph) -> None:
    """Add one choice after the other, in fp32."""
    fx_graph = graph.module.graph
    for node in [node for node in fx_graph.nodes if node.target is experts]:
        value, ids = node.meta["val"], node.args[3].meta["val"]
        with fx_graph.inserting_before(node):
            parts = fx_graph.call_function(expert_parts, node.args, node.kwargs)
            parts.meta["val"] = value.new_empty((value.shape[0], ids.shape[1], value.shape[1]))
            total = None
            for choice in range(ids.shape[1]):
                part = fx_graph.call_function(_aten.select.int, (parts, 1, choice))
                part.meta["val"] = value
                wide = fx_graph.call_function(_aten.to.dtype, (part, torch.float32))
                wide.meta["val"] = value.float()
                if total is None:
                    total = wide
                else:
                    total = fx_graph.call_function(_aten.add.Tensor, (total, wide))
                    total.meta["val"] = wide.meta["val"]
            new = fx_graph.call_function(_aten.to.dtype, (total, value.dtype))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        fx_graph.erase_node(node)
    graph.clean()
