"""A linear whose result is added to something becomes halyard::linear_add: the product adds by itself.

The residual stream is then read and written once where it was read twice and written twice: on an
H100, 8192 rows, a product with add and norm takes 0.89 (1B) to 0.99 (8B) of the time
(benchmarks/gpu_wide_linears.py).
"""

from __future__ import annotations

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.hal.kernels.triton.skinny import linear_add, skinny_linear

__all__ = ["add_in_linears"]


def add_in_linears(graph: ModelGraph) -> None:
    """Join each halyard::skinny_linear without bias and the one add that reads it."""
    fx_graph = graph.module.graph
    for node in [node for node in fx_graph.nodes if node.target is torch.ops.aten.add.Tensor]:
        if node.kwargs.get("alpha", 1) != 1:
            continue
        for linear, residual in (node.args, node.args[::-1]):
            if _alone(linear, node) and _like(residual, node):
                _, weight, _ = linear.args
                with fx_graph.inserting_before(node):
                    new = fx_graph.call_function(linear_add, (residual, linear.args[0], weight))
                new.meta.update(node.meta)
                node.replace_all_uses_with(new)
                fx_graph.erase_node(node)
                fx_graph.erase_node(linear)
                break
    graph.clean()


def _alone(value: object, add: fx.Node) -> bool:
    """A linear without bias that only `add` reads, of the add's own shape and dtype."""
    return (
        isinstance(value, fx.Node)
        and value.target is skinny_linear
        and value.args[2] is None
        and list(value.users) == [add]
        and _like(value, add)
    )


def _like(value: object, add: fx.Node) -> bool:
    if not isinstance(value, fx.Node):
        return False
    mine, whole = value.meta["val"], add.meta["val"]
    return (
        isinstance(mine, torch.Tensor) and mine.shape == whole.shape and mine.dtype == whole.dtype
    )
