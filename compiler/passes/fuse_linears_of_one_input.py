"""Linears that read the same tensor become one: q, k and v; gate and up.

One product of a wider matrix reads the input once and keeps the machine busier. The parts are
slices of the result, views without a copy.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph, WeightRecipe

__all__ = ["fuse_linears_of_one_input"]

_LINEAR = torch.ops.aten.linear.default


def fuse_linears_of_one_input(graph: ModelGraph) -> None:
    """Join every group of two or more linears with one input; weights are joined along dim 0."""
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = defaultdict(list)
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and node.target is _LINEAR and _own_weights(graph, node):
            has_bias = len(node.args) > 2 and node.args[2] is not None
            groups[node.args[0], has_bias].append(node)
    for (source, has_bias), linears in groups.items():
        if len(linears) > 1:
            _fuse(graph, source, has_bias, linears)
    graph.clean()


def _own_weights(graph: ModelGraph, linear: fx.Node) -> bool:
    """Its weight and bias are inputs that no other node reads (a tied embedding is left alone)."""
    tensors = [arg for arg in linear.args[1:] if arg is not None]
    return all(graph.weight_of(arg) and len(arg.users) == 1 for arg in tensors)  # type: ignore[union-attr]


def _fuse(graph: ModelGraph, source: fx.Node, has_bias: bool, linears: list[fx.Node]) -> None:
    fx_graph = graph.module.graph
    args = [source, _join(graph, [node.args[1] for node in linears])]  # type: ignore[misc]
    if has_bias:
        args.append(_join(graph, [node.args[2] for node in linears]))  # type: ignore[misc]
    sizes = [int(node.meta["val"].shape[-1]) for node in linears]
    with fx_graph.inserting_before(linears[0]):
        fused = fx_graph.call_function(_LINEAR, tuple(args))
        parts = []
        start = 0
        for node, size in zip(linears, sizes, strict=True):
            part = fx_graph.call_function(
                torch.ops.aten.slice.Tensor, (fused, -1, start, start + size)
            )
            parts.append((node, part))
            start += size
    example = linears[0].meta["val"]
    with example.fake_mode:
        fused.meta["val"] = example.new_empty((*example.shape[:-1], sum(sizes)))
        for node, part in parts:
            value = fused.meta["val"]
            stop = sum(sizes[: linears.index(node) + 1])
            part.meta["val"] = value[..., stop - sizes[linears.index(node)] : stop]
    for node, part in parts:
        node.replace_all_uses_with(part)
        fx_graph.erase_node(node)


def _join(graph: ModelGraph, weights: list[fx.Node]) -> fx.Node:
    names = [node.meta["weight"] for node in weights]
    sources = tuple(source for name in names for source in graph.recipes[name].sources)
    examples = [node.meta["val"] for node in weights]
    with examples[0].fake_mode:
        example = torch.cat(examples)
    return graph.add_weight("+".join(names), WeightRecipe(sources), example)
