"""A product whose first half, activated, multiplies its second takes the gate in.

halyard::packed_linear becomes halyard::gated_linear: the product's two halves never leave for memory,
and no pass over them by one thread follows. halyard::skinny_linear becomes halyard::gated_product: the
same on a Hopper for many rows (hal/kernels/triton/hopper_linear.py).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.hal.kernels.native.linear import PANEL, gated_linear, packed_linear
from halyard.hal.kernels.triton.gated import gated_product
from halyard.hal.kernels.triton.skinny import skinny_linear

__all__ = ["gate_linears"]

_aten = torch.ops.aten


def gate_linears(graph: ModelGraph) -> None:
    """Join each of our linears with the activation and the product of its halves."""
    fx_graph = graph.module.graph
    for node in [node for node in fx_graph.nodes if node.target is _aten.mul.Tensor]:
        for activated, up in (node.args, node.args[::-1]):
            gelu = _activation(activated)
            if gelu is None:
                continue
            gate = activated.args[0]
            linear = _part(gate, 0)
            if linear is None or _part(up, 1) is not linear:
                continue
            if _ends_here([activated, gate, up], node) and _divides(linear):
                with fx_graph.inserting_before(node):
                    new = _joined(fx_graph, linear, gelu)
                new.meta.update(node.meta)
                node.replace_all_uses_with(new)
                fx_graph.erase_node(node)
                break
    graph.clean()


def _joined(fx_graph: fx.Graph, linear: fx.Node, gelu: bool) -> fx.Node:
    if linear.target is skinny_linear:
        x, weight, _ = linear.args
        return fx_graph.call_function(gated_product, (x, weight, gelu))
    x, packed, _, outputs = linear.args
    return fx_graph.call_function(gated_linear, (x, packed, outputs // 2, gelu))  # type: ignore[operator]


def _activation(node: object) -> bool | None:
    """False for silu, True for gelu by tanh, None for anything else."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is _aten.silu.default:
        return False
    by_tanh = node.kwargs.get("approximate") == "tanh"
    return True if node.target is _aten.gelu.default and by_tanh else None


def _part(node: object, number: int) -> fx.Node | None:
    """The linear of ours without bias whose first (0) or second (1) half of outputs this is."""
    if not isinstance(node, fx.Node):
        return None
    source = _source(node)
    if source is None or source.target not in (packed_linear, skinny_linear):
        return None
    if source.args[2] is not None:
        return None
    whole, part = source.meta["val"].shape[-1], node.meta["val"].shape[-1]
    if node.target is operator.getitem:
        begins = node.args[1] * part
    else:
        begins = (node.args[2] if len(node.args) > 2 else None) or 0
    return source if 2 * part == whole and begins == number * part else None


def _source(node: fx.Node) -> fx.Node | None:
    """What a slice of the last axis, or one of its chunks, is taken from."""
    if node.target is _aten.slice.Tensor and _is_last(node, node.args[1]):
        return node.args[0]  # type: ignore[return-value]
    if node.target is operator.getitem:
        chunks: fx.Node = node.args[0]  # type: ignore[assignment]
        kinds = (_aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default)
        if chunks.target in kinds:
            axis = chunks.args[2] if len(chunks.args) > 2 else chunks.kwargs.get("dim", 0)
            if _is_last(chunks, axis):
                return chunks.args[0]  # type: ignore[return-value]
    return None


def _is_last(node: fx.Node, axis: object) -> bool:
    rank: int = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return axis == -1 or axis == rank - 1


def _ends_here(nodes: list[fx.Node], product: fx.Node) -> bool:
    """Nobody else reads the halves or what becomes of them."""
    activated, gate, up = nodes
    return (
        list(activated.users) == [product]
        and list(gate.users) == [activated]
        and list(up.users) == [product]
    )


def _divides(linear: fx.Node) -> bool:
    """Nobody reads the product as a whole; where it is packed, each half is whole panels."""
    readers = {
        half
        for user in linear.users
        for half in ([user] if user.target is _aten.slice.Tensor else user.users)
    }
    if linear.target is skinny_linear:
        return len(readers) == 2
    outputs: int = linear.args[3]  # type: ignore[assignment]
    return len(readers) == 2 and outputs % (2 * PANEL) == 0
