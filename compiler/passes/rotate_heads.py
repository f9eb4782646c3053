"""The rotary embedding of an attention's queries and keys becomes halyard::rotate_pair: one launch.

What Inductor makes of transformers' q * cos + cat(-q2, q1) * sin reads two bytes at a time, behind
masks: about 4 times what the bytes take. Heads that are normed first stay: there it does norm and
rotation at once.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.hal.kernels.triton.rotary import rotate_pair
from halyard.hal.kernels.triton.skinny import skinny_linear
from halyard.hal.ops import paged_attention

__all__ = ["rotate_heads"]

_aten = torch.ops.aten
_LINEARS = (_aten.linear.default, skinny_linear)


@dataclass(frozen=True, slots=True)
class _Rotation:
    """heads [1, tokens, heads, dim] rotated by cos and sin, each [1, 1, tokens, dim]."""

    heads: fx.Node
    cos: fx.Node
    sin: fx.Node


def rotate_heads(graph: ModelGraph) -> None:
    """Rotate queries and keys that come straight from a product by one operator."""
    fx_graph = graph.module.graph
    rows: dict[fx.Node, fx.Node] = {}  # all layers read one table
    for attention in [node for node in fx_graph.nodes if node.target is paged_attention]:
        q, k = (_rotation(value, attention) for value in attention.args[:2])
        if q is None or k is None or (q.cos, q.sin) != (k.cos, k.sin):
            continue
        with fx_graph.inserting_before(attention):
            cos, sin = (_rows(fx_graph, table, rows) for table in (q.cos, q.sin))
            parts = [_call(fx_graph, _aten.select.int, x.heads, 0, 0) for x in (q, k)]
            both = _call(fx_graph, rotate_pair, *parts, cos, sin)
            for place in (0, 1):
                attention.update_arg(place, _call(fx_graph, operator.getitem, both, place))
    graph.clean()


def _call(fx_graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new node and the value it would have."""
    node = fx_graph.call_function(target, args)
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    if target is operator.getitem:
        node.meta["val"] = values[0][values[1]]
    else:
        with values[0].fake_mode:
            node.meta["val"] = target(*values)
    return node


def _rows(fx_graph: fx.Graph, table: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """cos or sin as [tokens, dim]."""
    if table not in made:
        value: Any = table
        while value.target is _aten.unsqueeze.default:
            value = value.args[0]
        while value.meta["val"].dim() > 2:
            value = _call(fx_graph, _aten.select.int, value, 0, 0)
        made[table] = value
    return made[table]


def _rotation(value: Any, attention: fx.Node) -> _Rotation | None:
    """What an attention's input [tokens, heads, dim] is a rotation of, if nobody else reads it."""
    turned = _only(value, _aten.transpose.int, attention)
    if turned is None or turned.args[1:] != (0, 1):
        return None
    chosen = _only(turned.args[0], _aten.select.int, turned)
    if chosen is None or chosen.args[1:] != (0, 0):
        return None
    total: Any = chosen.args[0]
    reader, rest = chosen, None
    joined = _only(total, _aten.cat.default, chosen)
    if joined is not None:  # beside the dims that don't turn, if there are none
        total, rest, reader = *_pair(joined), joined
        if rest is None or rest.meta["val"].shape[-1] != 0:
            return None
    add = _only(total, _aten.add.Tensor, reader)
    if add is None or add.kwargs.get("alpha", 1) != 1:
        return None
    for straight, crossed in (add.args, add.args[::-1]):
        if (found := _terms(add, straight, crossed, rest)) is not None:
            return found
    return None


def _terms(add: fx.Node, straight: Any, crossed: Any, rest: fx.Node | None) -> _Rotation | None:
    """Of `add`, the sum of straight = x * cos and crossed = cat(-x2, x1) * sin."""
    by_cos, by_sin = (_only(term, _aten.mul.Tensor, add) for term in (straight, crossed))
    if by_cos is None or by_sin is None:
        return None
    for halves, sin in (by_sin.args, by_sin.args[::-1]):
        cat = _only(halves, _aten.cat.default, by_sin)
        negated, first = _pair(cat) if cat is not None else (None, None)
        neg = _only(negated, _aten.neg.default, cat)
        if neg is None:
            continue
        second: Any = neg.args[0]
        readers = {by_cos, first, second} | ({rest} if rest is not None else set())
        for x, cos in (by_cos.args, by_cos.args[::-1]):
            if (
                isinstance(x, fx.Node)
                and set(x.users) == readers
                and _is_half(first, 0, x, cat)
                and _is_half(second, 1, x, neg)
                and _fit(x, cos, sin, add)
                and (heads := _straight_from_a_linear(x)) is not None
            ):
                return _Rotation(heads, cos, sin)  # type: ignore[arg-type]
    return None


def _only(value: Any, target: object, reader: fx.Node | None) -> fx.Node | None:
    """`value` if it is a call of `target` that `reader` alone reads."""
    if isinstance(value, fx.Node) and value.target is target and list(value.users) == [reader]:
        return value
    return None


def _pair(cat: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The two tensors that are joined along the last axis; None, None: it does something else."""
    parts: Any = cat.args[0]
    axis = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    if len(parts) != 2 or axis not in (-1, cat.meta["val"].dim() - 1):
        return None, None
    return parts[0], parts[1]


def _is_half(value: Any, number: int, x: fx.Node, reader: fx.Node | None) -> bool:
    """Whether this is the first (0) or second (1) half of x's last axis, and `reader`'s alone."""
    part = _only(value, _aten.slice.Tensor, reader)
    if part is None or len(part.args) != 4:
        return False
    source, axis, *span = part.args
    half, odd = divmod(int(x.meta["val"].shape[-1]), 2)
    ends = (half,) if number == 0 else (2 * half, sys.maxsize)  # the latter: to the end
    return (
        source is x
        and axis in (-1, 3)
        and not odd
        and tuple(span) in [(number * half, end) for end in ends]
    )


def _fit(x: fx.Node, cos: Any, sin: Any, add: fx.Node) -> bool:
    """x and the sum [1, heads, tokens, dim], cos and sin [1, 1, tokens, dim], all of one dtype."""
    if not isinstance(cos, fx.Node) or not isinstance(sin, fx.Node):
        return False
    value = x.meta["val"]
    if value.dim() != 4 or add.meta["val"].dtype != value.dtype:
        return False
    wanted = ["1", "1", *map(str, value.shape[2:])]
    tables = [node.meta["val"] for node in (cos, sin)]
    return all(t.dtype == value.dtype and list(map(str, t.shape)) == wanted for t in tables)


def _straight_from_a_linear(x: fx.Node) -> fx.Node | None:
    """[1, tokens, heads, dim] in a product's own order, if x is that with two axes swapped."""
    if x.target is not _aten.transpose.int or x.args[1:] != (1, 2):
        return None
    heads = _only(x.args[0], _aten.view.default, x)
    if heads is None:
        return None
    source: Any = heads.args[0]
    before, after = source.meta["val"].shape, heads.meta["val"].shape
    if (
        len(before) != 3
        or len(after) != 4
        or list(map(str, before[:2])) != list(map(str, after[:2]))
    ):
        return None
    if source.target is _aten.slice.Tensor and len(source.args) == 4 and source.args[1] in (-1, 2):
        source = source.args[0]
    return heads if source.target in _LINEARS else None
