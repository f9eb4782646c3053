"""Finds out whether a segment treats every token by itself.

The last segment of a decoder does: output projection, feed-forward part, norm and head look at one
token at a time. So where few tokens need logits, it has to see those alone: in a prefill that saves
a layer's projections.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

__all__ = ["token_axes"]

_aten = torch.ops.aten
# Shape changes and copies; that the tokens' axis survives is read off the result's shape.
_SHAPES = frozenset({
    _aten.view, _aten.reshape, _aten._unsafe_view, _aten.unsqueeze, _aten.squeeze, _aten.transpose,
    _aten.permute, _aten.expand, _aten.contiguous, _aten.clone, _aten.alias, _aten.to,
    _aten._to_copy, _aten.split, _aten.split_with_sizes, _aten.chunk, _aten.cat, _aten.type_as,
})  # fmt: skip
_ONE_AXIS = frozenset({_aten.slice, _aten.select, _aten.softmax, _aten._softmax, _aten.topk})
_REDUCTIONS = frozenset({_aten.mean, _aten.sum, _aten.amax})
_LAST_AXIS = frozenset({_aten.linear, _aten.layer_norm, _aten.rms_norm, _aten.native_layer_norm})
_OURS = frozenset({
    "halyard::packed_linear", "halyard::gated_linear", "halyard::quantized_linear", "halyard::experts",
    "halyard::skinny_linear", "halyard::linear_add", "halyard::gated_product",
    "halyard::rotate_pair", "halyard::largest", "halyard::expert_parts",
})  # fmt: skip


def token_axes(
    module: fx.GraphModule, inputs: Sequence[fx.Node], tokens: str, wanted: str
) -> tuple[int, ...] | None:
    """Along which axis each input has the tokens; -1 for those without. None: not row by row.

    Args:
        inputs: the nodes of the whole graph that the placeholders of `module` stand for.
        tokens: the symbol that is the number of tokens.
        wanted: the input that names the tokens whose logits are wanted.
    """
    axes: list[int] = []
    chosen: fx.Node | None = None
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for placeholder, source in zip(placeholders, inputs, strict=True):
        axis = _axis(placeholder.meta.get("val"), tokens)
        if axis is None:
            return None
        axes.append(axis)
        if source.meta.get("input") == wanted:
            chosen = placeholder
    if chosen is None or max(axes) < 0:
        return None
    for node in module.graph.nodes:
        if node.op == "call_function" and not _is_by_row(node, tokens, chosen):
            return None
    return tuple(axes)


def _axis(value: object, tokens: str) -> int | None:
    """The axis that has the tokens, -1 if there is none, None if it can't be told."""
    if not isinstance(value, Tensor):
        return -1
    found = [axis for axis, size in enumerate(value.shape) if str(size) == tokens]
    sizes: list[int | torch.SymInt] = list(value.shape)  # torch says int, and means either
    mixed = any(
        str(size) != tokens and tokens in {str(s) for s in size.node.expr.free_symbols}
        for size in sizes
        if isinstance(size, torch.SymInt)
    )
    if len(found) > 1 or mixed:
        return None
    return found[0] if found else -1


def _is_by_row(node: fx.Node, tokens: str, chosen: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
        return True
    if node.target is operator.getitem:  # one of several results, which were looked at as such
        return _axis(value, tokens) is not None
    parts = value if isinstance(value, tuple | list) else (value,)
    sources = [arg.meta.get("val") for arg in node.all_input_nodes]
    if any(_axis(part, tokens) is None for part in (*parts, *sources)):
        return False
    before = max((_axis(source, tokens) or 0 for source in sources), default=-1)
    touched = any((_axis(source, tokens) or 0) >= 0 for source in sources)
    if not touched:  # of weights alone; if it has as many rows as there are tokens, it counts them
        return all(_axis(part, tokens) == -1 for part in parts)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    packet, name = target.overloadpacket, target.name().split(".")[0]
    if packet is _aten.index:
        return chosen in node.all_input_nodes
    if all(_axis(part, tokens) == -1 for part in parts):
        return False  # something became of all tokens together
    if torch.Tag.pointwise in target.tags or packet in _SHAPES or name in _OURS:
        return True
    if packet is _aten.addmm:  # of GPT-2's layers: bias, tokens' vectors, a weight
        axes = [_axis(arg.meta.get("val"), tokens) for arg in node.args if isinstance(arg, fx.Node)]
        return axes == [-1, 0, -1]
    rank = sources[0].dim() if isinstance(sources[0], Tensor) else 0
    if packet in _LAST_AXIS:
        return before < rank - 1
    if packet in _ONE_AXIS or packet in _REDUCTIONS:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if packet is _aten.topk:
            given = node.args[2] if len(node.args) > 2 else -1
        dims = given if isinstance(given, tuple | list) else (given,)
        return all(isinstance(dim, int) and dim % rank != before for dim in dims)
    return False
