"""What passes share that put a linear's weight into another form: which weights, and whose users."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph

__all__ = ["linear_weights", "replace_users"]

_LINEAR = torch.ops.aten.linear.default
_EMBEDDING = torch.ops.aten.embedding.default
_DTYPES = (torch.float32, torch.bfloat16)
_Call = tuple[Callable[..., object], tuple[object, ...]]


def linear_weights(graph: ModelGraph, multiple: int) -> list[fx.Node]:
    """Matrices that linears read, and nothing else but plain lookups (a tied embedding).

    Args:
        multiple: the inputs are a multiple of that many.
    """
    weights = [node for node in graph.module.graph.nodes if graph.weight_of(node)]
    return [weight for weight in weights if _of_linears(weight, multiple)]


def _of_linears(weight: fx.Node, multiple: int) -> bool:
    value = weight.meta["val"]
    if value.dim() != 2 or value.dtype not in _DTYPES or value.shape[1] % multiple:
        return False
    for user in weight.users:
        is_linear = user.target is _LINEAR and user.args[1] is weight
        plain_lookup = user.target is _EMBEDDING and user.args[0] is weight
        if not (is_linear or plain_lookup):
            return False
        if is_linear and user.args[0].meta["val"].dtype != value.dtype:  # type: ignore[union-attr]
            return False
    return any(user.target is _LINEAR for user in weight.users)


def replace_users(
    graph: ModelGraph,
    weight: fx.Node,
    linear: Callable[[fx.Node, object], _Call],
    lookup: Callable[[fx.Node], _Call],
) -> None:
    """Replace what reads the weight by the calls that `linear(input, bias)` and `lookup(ids)` name."""
    fx_graph = graph.module.graph
    for user in list(weight.users):
        if user.target is _LINEAR:
            bias = user.args[2] if len(user.args) > 2 else None
            call = linear(user.args[0], bias)  # type: ignore[arg-type]
        else:
            call = lookup(user.args[1])  # type: ignore[arg-type]
        with fx_graph.inserting_before(user):
            new = fx_graph.call_function(*call)  # type: ignore[arg-type]
        new.meta.update(user.meta)
        user.replace_all_uses_with(new)
        fx_graph.erase_node(user)
