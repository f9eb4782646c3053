"""Translations of what moves data about: shapes, slices, joins, gathers; and of sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from halyard.compiler.graphs.onnx_translate import Translator, argument, handler, result
from halyard.hal.errors import ModelError

__all__: list[str] = []


@handler("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
         "aten.flatten.using_ints")  # fmt: skip
def _view(t: Translator, node: fx.Node) -> str:
    return t.reshaped(t.tensor(node.args[0]), result(node), node.args[1])


@handler("aten.transpose.int", "aten.t.default")
def _transpose(t: Translator, node: fx.Node) -> str:
    rank = result(node).dim()
    order = list(range(rank))
    first, second = node.args[1:3] if len(node.args) > 2 else (0, 1)
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return t.op("Transpose", t.tensor(node.args[0]), perm=order)


@handler("aten.permute.default")
def _permute(t: Translator, node: fx.Node) -> str:
    rank = result(node).dim()
    dims: Any = node.args[1]
    return t.op("Transpose", t.tensor(node.args[0]), perm=[dim % rank for dim in dims])


@handler("aten.unsqueeze.default")
def _unsqueeze(t: Translator, node: fx.Node) -> str:
    return t.op("Unsqueeze", t.tensor(node.args[0]), t.ints([node.args[1]]))


@handler("aten.squeeze.dim", "aten.squeeze.dims")
def _squeeze(t: Translator, node: fx.Node) -> str:
    dims: Any = node.args[1]
    dims = dims if isinstance(dims, list | tuple) else [dims]
    shape = result(node.args[0]).shape
    ones = [dim for dim in dims if isinstance(shape[dim], int) and shape[dim] == 1]
    return t.op("Squeeze", t.tensor(node.args[0]), t.ints(ones)) if ones else t.tensor(node.args[0])


@handler("aten.expand.default")
def _expand(t: Translator, node: fx.Node) -> str:
    wanted: Any = node.args[1]
    # 1 in ONNX leaves a dimension as it is, as -1 does in torch.
    sizes = [1 if isinstance(size, int) and size == -1 else size for size in wanted]
    return t.op("Expand", t.tensor(node.args[0]), t.sizes(sizes))


@handler("aten.repeat.default")
def _repeat(t: Translator, node: fx.Node) -> str:
    return t.op("Tile", t.tensor(node.args[0]), t.sizes(node.args[1]))


@handler("aten.repeat_interleave.self_int")
def _repeat_interleave(t: Translator, node: fx.Node) -> str:
    source = result(node.args[0])
    count = node.args[1]
    dim = argument(node, 2, "dim")
    if dim is None:
        raise ModelError("ONNX graphs can't hold repeat_interleave without a dimension")
    rank = source.dim()
    dim = dim % rank
    wide = t.op("Unsqueeze", t.tensor(node.args[0]), t.ints([dim + 1]))
    sizes: list[Any] = [1] * (rank + 1)
    sizes[dim + 1] = count
    wide = t.op("Expand", wide, t.ints(sizes))
    shape = t.op("Shape", t.tensor(node.args[0]))
    factors = [count if axis == dim else 1 for axis in range(rank)]
    return t.op("Reshape", wide, t.op("Mul", shape, t.ints(factors)))


@handler("aten.slice.Tensor")
def _slice(t: Translator, node: fx.Node) -> str:
    dim = argument(node, 1, "dim", 0)
    start = argument(node, 2, "start") or 0
    stop = argument(node, 3, "end")
    step = argument(node, 4, "step", 1)
    stop = torch.iinfo(torch.int64).max if stop is None else stop
    size = result(node.args[0]).shape[dim]
    whole = isinstance(stop, int) and stop >= (size if isinstance(size, int) else 1 << 62)
    if isinstance(start, int) and start == 0 and step == 1 and whole:
        return t.tensor(node.args[0])
    bounds = (t.sizes([start]), t.sizes([stop]), t.ints([dim]), t.ints([step]))
    return t.op("Slice", t.tensor(node.args[0]), *bounds)


@handler("aten.select.int")
def _select(t: Translator, node: fx.Node) -> str:
    dim, index = node.args[1:3]
    shape = result(node.args[0]).shape
    if isinstance(shape[dim], int) and shape[dim] == 1:  # type: ignore[index]
        return t.op("Squeeze", t.tensor(node.args[0]), t.ints([dim]))  # without a copy
    return t.op("Gather", t.tensor(node.args[0]), t.tensor(index, torch.int64), axis=dim)


@handler("aten.cat.default")
def _cat(t: Translator, node: fx.Node) -> str:
    parts: Any = node.args[0]
    dtype = result(node).dtype
    return t.op(
        "Concat", *(t.tensor(part, dtype) for part in parts), axis=argument(node, 1, "dim", 0)
    )


@handler("aten.stack.default")
def _stack(t: Translator, node: fx.Node) -> str:
    parts: Any = node.args[0]
    dim = argument(node, 1, "dim", 0) % result(node).dim()
    wide = [t.op("Unsqueeze", t.tensor(part), t.ints([dim])) for part in parts]
    return t.op("Concat", *wide, axis=dim)


@handler("aten.split_with_sizes.default", "aten.chunk.default", "aten.split.Tensor",
         "aten.unbind.int")  # fmt: skip
def _split(t: Translator, node: fx.Node) -> list[str]:
    dim = argument(node, 1 if "unbind" in str(node.target) else 2, "dim", 0)
    parts: list[Tensor] = list(node.meta["val"])
    if "unbind" in str(node.target):
        source = t.tensor(node.args[0])
        return [t.op("Gather", source, t.ints(i), axis=dim) for i in range(len(parts))]
    sizes = [part.shape[dim] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        raise ModelError("ONNX graphs can't hold a split along an unknown dimension")
    return t.graph.ops(
        "Split", t.tensor(node.args[0]), t.ints(sizes), num_outputs=len(parts), axis=dim
    )


@handler("<built-in function getitem>")
def _getitem(t: Translator, node: fx.Node) -> Any:
    position: Any = node.args[1]
    return t.value(node.args[0])[position]


@handler("aten.pad.default", "aten.constant_pad_nd.default")
def _pad(t: Translator, node: fx.Node) -> str:
    if argument(node, 2, "mode", "constant") not in ("constant", 0, 0.0):
        raise ModelError("ONNX graphs can't hold padding that is not constant")
    widths: Any = node.args[1]
    rank = result(node).dim()
    before, after = [0] * rank, [0] * rank
    for number in range(len(widths) // 2):  # torch names the last dimension first
        before[rank - 1 - number], after[rank - 1 - number] = widths[2 * number : 2 * number + 2]
    fill = argument(node, 3, "value") or 0
    pads = t.ints([*before, *after])
    return t.op("Pad", t.tensor(node.args[0]), pads, t.tensor(fill, result(node).dtype))


@handler("aten.clone.default", "aten.contiguous.default", "aten.alias.default",
         "aten.detach.default", "aten.dropout.default")  # fmt: skip
def _same(t: Translator, node: fx.Node) -> str:
    return t.tensor(node.args[0])


@handler("aten.embedding.default")
def _embedding(t: Translator, node: fx.Node) -> str:
    return t.op("Gather", t.tensor(node.args[0]), t.tensor(node.args[1]), axis=0)


@handler("aten.index.Tensor")
def _index(t: Translator, node: fx.Node) -> str:
    indices: Any = node.args[1]
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or result(given[0][1]).dtype == torch.bool:
        raise ModelError("ONNX graphs can't hold an index by several tensors or by a mask")
    dim, index = given[0]
    return t.op("Gather", t.tensor(node.args[0]), t.tensor(index), axis=dim)


@handler("aten.index_select.default")
def _index_select(t: Translator, node: fx.Node) -> str:
    return t.op("Gather", t.tensor(node.args[0]), t.tensor(node.args[2]), axis=node.args[1])


@handler("aten.gather.default")
def _gather(t: Translator, node: fx.Node) -> str:
    return t.op("GatherElements", t.tensor(node.args[0]), t.tensor(node.args[2]), axis=node.args[1])


@handler("aten.scatter.value", "aten.scatter_.value")
def _scatter(t: Translator, node: fx.Node) -> str:
    indices = t.tensor(node.args[2])
    fill = t.tensor(node.args[3], result(node).dtype)
    updates = t.op("Expand", fill, t.op("Shape", indices))
    return t.op("ScatterElements", t.tensor(node.args[0]), indices, updates, axis=node.args[1])


@handler("aten.topk.default")
def _topk(t: Translator, node: fx.Node) -> list[str]:
    count, axis = node.args[1], argument(node, 2, "dim", -1)
    largest, in_order = argument(node, 3, "largest", True), argument(node, 4, "sorted", True)
    return t.graph.ops(
        "TopK",
        t.tensor(node.args[0]),
        t.sizes([count]),
        num_outputs=2,
        axis=axis,
        largest=int(largest),
        sorted=int(in_order),
    )


@handler("aten.sym_size.int")
def _sym_size(t: Translator, node: fx.Node) -> int | str:
    dim: Any = node.args[1]
    rank = result(node.args[0]).dim()
    size = result(node.args[0]).shape[dim]
    if isinstance(size, int):
        return size
    return t.op("Shape", t.tensor(node.args[0]), start=dim % rank, end=dim % rank + 1)


@handler("<built-in function mul>", "<built-in function add>", "<built-in function sub>",
         "<built-in function floordiv>")  # fmt: skip
def _size_arithmetic(t: Translator, node: fx.Node) -> int | str:
    kind = {"mul": "Mul", "add": "Add", "sub": "Sub", "floordiv": "Div"}[node.target.__name__]  # type: ignore[union-attr]
    left, right = (t.sizes([arg]) for arg in node.args)
    return t.op(kind, left, right)
