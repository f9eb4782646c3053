"""From an fx graph of aten operators to a relax function, operator by operator.

Our own translation rather than TVM's importer of exported programs: segments hold few operators,
and linears must become calls of torch's, which are a hundred times faster than TVM's default ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from halyard.hal.errors import ModelError

__all__ = ["LINEAR", "segment_module"]

LINEAR = "halyard.linear"  # a global function: x [.., in], weight [out, in], (bias [out],) out
_BINARY = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}
_UNARY = {
    "neg": "negative", "cos": "cos", "sin": "sin", "tanh": "tanh", "sigmoid": "sigmoid",
    "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "abs": "abs", "erf": "erf",
    "silu": "nn.silu", "relu": "nn.relu",
}  # fmt: skip


def segment_module(segment: fx.GraphModule) -> Any:
    """An IRModule with the function `main`: the segment's inputs in, a tuple of tensors out.

    Raises:
        ModelError: there is no translation of an operator, or of this use of it.
    """
    return _Translator().translate(segment)


class _Translator:
    def __init__(self) -> None:
        from tvm import relax

        self.relax = relax
        self.builder = relax.BlockBuilder()
        self.values: dict[fx.Node, Any] = {}
        self.symbols: dict[str, Any] = {}

    def translate(self, segment: fx.GraphModule) -> Any:
        """Emit all nodes. Raises ModelError as segment_module does."""
        nodes = list(segment.graph.nodes)
        parameters = [node for node in nodes if node.op == "placeholder"]
        for number, node in enumerate(parameters):
            self.values[node] = self.relax.Var(f"x{number}", self.type(_tensor(node)))
        with self.builder.function("main", [self.values[node] for node in parameters]):
            with self.builder.dataflow():
                for node in nodes:
                    if node.op == "call_function":
                        self.values[node] = self.node(node)
                    elif node.op == "output":
                        made = [self.values[value] for value in node.args[0]]
                        output = self.builder.emit_output(self.relax.Tuple(made))
                    elif node.op != "placeholder":
                        raise ModelError(f"TVM graphs can't hold a node of kind {node.op}")
            self.builder.emit_func_output(output)
        return self.builder.get()

    def node(self, node: fx.Node) -> Any:
        """One node's value: a relax expression, a list of them, or None for a size."""
        if not isinstance(node.meta.get("val"), Tensor | list | tuple):
            return None  # sizes are read off the shapes of results
        name = str(node.target)
        stem = name.split(".")[1].removesuffix("_") if name.startswith("aten.") else name
        if name == "<built-in function getitem>":
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        function = _HANDLERS.get(stem)
        if function is not None:
            made = function(self, node)
        elif stem in _BINARY:
            made = self.binary(node, stem)
        elif stem in _UNARY:
            made = self.op(_UNARY[stem], self.tensor(node.args[0], _tensor(node).dtype))
        else:
            raise ModelError(f"TVM graphs can't hold the operator {name} yet: use another backend")
        return made if isinstance(made, list) else self.builder.emit(made)

    # What handlers ask for.

    def op(self, name: str, *arguments: Any, **named: Any) -> Any:
        """An operator of relax by its name there."""
        found: Any = self.relax.op
        for part in name.split("."):
            found = getattr(found, part)
        return found(*arguments, **named)

    def size(self, size: int | torch.SymInt) -> Any:
        """A size as relax has it."""
        if isinstance(size, int):
            return size
        from tvm import tirx

        name = str(size)
        if not name.isidentifier():
            raise ModelError(f"TVM graphs can't hold the size {name} yet: use another backend")
        if name not in self.symbols:
            self.symbols[name] = tirx.Var(name, "int64")
        return self.symbols[name]

    def shape(self, value: Tensor) -> list[Any]:
        """A shape as relax has it."""
        return [self.size(size) for size in value.shape]

    def type(self, value: Tensor) -> Any:
        """The type of a tensor as relax has it."""
        return self.relax.TensorType(self.shape(value), _dtype(value.dtype))

    def tensor(self, argument: Any, dtype: torch.dtype) -> Any:
        """An argument as an expression of that dtype."""
        if isinstance(argument, fx.Node):
            if not isinstance(argument.meta.get("val"), Tensor):
                raise ModelError(f"TVM graphs can't compute with the size {argument.name} yet")
            if _tensor(argument).dtype == dtype:
                return self.values[argument]
            return self.builder.emit(self.op("astype", self.values[argument], _dtype(dtype)))
        return self.relax.const(argument, _dtype(dtype))

    def binary(self, node: fx.Node, stem: str) -> Any:
        """left op alpha * right"""
        dtype = _tensor(node).dtype
        right = self.tensor(node.args[1], dtype)
        alpha: Any = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = self.builder.emit(self.op("multiply", right, self.tensor(alpha, dtype)))
        return self.op(_BINARY[stem], self.tensor(node.args[0], dtype), right)


def _tensor(node: Any) -> Tensor:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise ModelError("TVM graphs can't take a size as an input of a segment")
    return value


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _same(t: _Translator, node: fx.Node) -> Any:
    """Casts, and what only copies."""
    return t.tensor(node.args[0], _tensor(node).dtype)


def _reshape(t: _Translator, node: fx.Node) -> Any:
    return t.op("reshape", t.values[node.args[0]], t.shape(_tensor(node)))  # type: ignore[index]


def _expand(t: _Translator, node: fx.Node) -> Any:
    return t.op("broadcast_to", t.values[node.args[0]], t.shape(_tensor(node)))  # type: ignore[index]


def _permute(t: _Translator, node: fx.Node) -> Any:
    rank = _tensor(node).dim()
    order = list(range(rank))
    if "permute" in str(node.target):
        dims: Any = node.args[1]
        order = [dim % rank for dim in dims]
    else:
        first, second = node.args[1:3] if len(node.args) > 2 else (0, 1)
        order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return t.op("permute_dims", t.values[node.args[0]], order)  # type: ignore[index]


def _slice(t: _Translator, node: fx.Node) -> Any:
    dim: int = _argument(node, 1, "dim", 0) % _tensor(node).dim()
    start, stop = _argument(node, 2, "start") or 0, _argument(node, 3, "end")
    step = _argument(node, 4, "step", 1)
    source = t.values[node.args[0]]  # type: ignore[index]
    size = _tensor(node.args[0]).shape[dim]
    if not isinstance(start, int) or not isinstance(stop, int | None) or step != 1:
        raise ModelError("TVM graphs can't hold a slice with unknown bounds or steps yet")
    if isinstance(size, int):
        stop = size if stop is None else min(stop, size)
        stop, start = (bound + size if bound < 0 else bound for bound in (stop, start))
    elif start == 0 and (stop is None or stop > 1 << 62):
        return source
    else:
        raise ModelError("TVM graphs can't hold a slice of an unknown dimension yet")
    return _piece(t, source, dim, start, stop)


def _piece(t: _Translator, source: Any, dim: int, start: int, stop: int) -> Any:
    return t.op("strided_slice", source, axes=[dim], begin=[start], end=[stop], assume_inbound=True)


def _select(t: _Translator, node: fx.Node) -> Any:
    dim, index = node.args[1:3]
    source = t.values[node.args[0]]  # type: ignore[index]
    if _tensor(node.args[0]).shape[dim] == 1:  # type: ignore[index]
        return t.op("reshape", source, t.shape(_tensor(node)))
    return t.op("take", source, t.tensor(index, torch.int64), axis=dim, mode="clip")


def _take(t: _Translator, node: fx.Node) -> Any:
    """Embeddings, and an index by one tensor."""
    source, given = t.values[node.args[0]], node.args[1]  # type: ignore[index]
    axis = 0
    if isinstance(given, list | tuple):
        indices = [(dim, index) for dim, index in enumerate(given) if index is not None]
        if len(indices) != 1 or _tensor(indices[0][1]).dtype == torch.bool:
            raise ModelError("TVM graphs can't hold an index by several tensors or by a mask yet")
        axis, given = indices[0]
    # The default mode reads wherever a wrong index points to.
    return t.op("take", source, t.values[given], axis=axis, mode="clip")  # type: ignore[index]


def _cat(t: _Translator, node: fx.Node) -> Any:
    parts: Any = node.args[0]
    dtype = _tensor(node).dtype
    return t.op(
        "concat", [t.tensor(part, dtype) for part in parts], axis=_argument(node, 1, "dim", 0)
    )


def _split(t: _Translator, node: fx.Node) -> list[Any]:
    dim = _argument(node, 2, "dim", 0) % _tensor(node.args[0]).dim()
    source, at, parts = t.values[node.args[0]], 0, []  # type: ignore[index]
    for part in node.meta["val"]:
        size = part.shape[dim]
        if not isinstance(size, int):
            raise ModelError("TVM graphs can't hold a split along an unknown dimension")
        parts.append(t.builder.emit(_piece(t, source, dim, at, at + size)))
        at += size
    return parts


def _pow(t: _Translator, node: fx.Node) -> Any:
    base = t.tensor(node.args[0], _tensor(node).dtype)
    if node.args[1] == 2:
        return t.op("multiply", base, base)
    return t.op("power", base, t.tensor(node.args[1], _tensor(node).dtype))


def _reduce(t: _Translator, node: fx.Node) -> Any:
    kind = "mean" if "mean" in str(node.target) else "sum"
    dims: Any = _argument(node, 1, "dim")
    return t.op(
        kind,
        t.tensor(node.args[0], _tensor(node).dtype),
        axis=list(dims) if dims else None,
        keepdims=bool(_argument(node, 2, "keepdim", False)),
    )


def _gelu(t: _Translator, node: fx.Node) -> Any:
    name = "nn.gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "nn.gelu"
    return t.op(name, t.values[node.args[0]])  # type: ignore[index]


def _linear(t: _Translator, node: fx.Node) -> Any:
    given = [x for x in (*node.args, node.kwargs.get("bias")) if isinstance(x, fx.Node)]
    arguments = [t.values[x] for x in given]
    return t.relax.call_dps_packed(LINEAR, t.relax.Tuple(arguments), t.type(_tensor(node)))


_HANDLERS: dict[str, Callable[[_Translator, fx.Node], Any]] = {
    **dict.fromkeys(("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach",
                     "dropout"), _same),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze"),
                    _reshape),
    **dict.fromkeys(("transpose", "t", "permute"), _permute),
    **dict.fromkeys(("embedding", "index"), _take),
    **dict.fromkeys(("split_with_sizes", "split", "chunk"), _split),
    **dict.fromkeys(("mean", "sum"), _reduce),
    "expand": _expand, "slice": _slice, "select": _select, "cat": _cat, "pow": _pow,
    "gelu": _gelu, "linear": _linear,
}  # fmt: skip
