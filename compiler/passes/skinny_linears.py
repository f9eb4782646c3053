"""Linears become halyard::skinny_linear, which has kernels of its own for a few rows on a GPU.

Weights stay as they are. On an H100 the linears of a step of one row then take 0.86 (1B) to 0.90 (8B)
of the library's time, and 0.95 at 4 to 16 rows (benchmarks/gpu_linear.py).
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
