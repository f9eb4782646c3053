"""From an fx graph of aten operators to an ONNX graph, operator by operator.

Our own translation rather than torch.onnx's: segments hold few operators, shapes are known but for
the number of tokens and rows, and a segment takes milliseconds instead of seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from halyard.compiler.graphs.onnx_graph import OnnxGraph, numpy_dtype, onnx_dtype
from halyard.hal.errors import ModelError

__all__ = ["Handler", "Translator", "handler"]

Handler = Callable[["Translator", fx.Node], Any]
_HANDLERS: dict[str, Handler] = {}


def handler(*names: str) -> Callable[[Handler], Handler]:
    """Register a function as the translation of operators, by name ("aten.add.Tensor")."""

    def register(function: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = function
        return function

    return register


class Translator:
    """Translates node after node. A node's value is a name, a list of names, or an int.

    Sizes that aren't known are names of int64 tensors of shape [1].
    """

    def __init__(self, graph: OnnxGraph) -> None:
        # Registered on import, which needs this module.
        import halyard.compiler.graphs.onnx_arithmetic
        import halyard.compiler.graphs.onnx_experts
        import halyard.compiler.graphs.onnx_shapes  # noqa: F401

        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        self._handlers = dict(_HANDLERS)

    def extend(self, extra: Mapping[str, Handler]) -> None:
        """Translate more operators, for this graph only."""
        self._handlers.update(extra)

    def node(self, node: fx.Node) -> None:
        """Translate one node.

        Raises:
            ModelError: there is no translation of the operator, or of this use of it.
        """
        name = str(node.target)
        function = self._handlers.get(name)
        if function is None:
            raise ModelError(f"ONNX graphs can't hold the operator {name} yet: use another backend")
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            check_mutation(node)
            self.values[node] = function(self, node)
            self.values[node.args[0]] = self.values[node]  # type: ignore[index]
        else:
            self.values[node] = function(self, node)

    # What handlers ask for.

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an ONNX node with one output."""
        return self.graph.op(kind, *inputs, **attributes)

    def ints(self, values: Any) -> str:
        """A constant int64 tensor of the shape of `values`."""
        return self.graph.constant(values)

    def value(self, argument: Any) -> Any:
        """What a node became; anything else as it is."""
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def tensor(self, argument: Any, dtype: torch.dtype | None = None) -> str:
        """An argument as a tensor's name, cast to `dtype` if it has another."""
        if isinstance(argument, fx.Node):
            value = argument.meta["val"]
            found = self.values[argument]
            if isinstance(value, Tensor):
                if dtype is None or value.dtype == dtype:
                    return str(found)
                return self.tensor_as(found, dtype)
            if isinstance(found, str):  # a size: [1] becomes a scalar
                scalar = self.op("Squeeze", found, self.ints([0]))
                return self.tensor_as(scalar, dtype or torch.int64)
            argument = found
        if isinstance(argument, bool):
            dtype = dtype or torch.bool
        elif isinstance(argument, int):
            dtype = dtype or torch.int64
        return self.graph.constant(argument, numpy_dtype(dtype or torch.float32))

    def tensor_as(self, name: str, dtype: torch.dtype) -> str:
        """A tensor cast to `dtype`; the runtime drops a cast that changes nothing."""
        return self.op("Cast", name, to=onnx_dtype(dtype))

    def size(self, argument: Any) -> int | str:
        """A size: an int, or the name of an int64 tensor of shape [1]."""
        found = self.value(argument)
        if isinstance(found, str | int):
            return found
        raise ModelError(f"a size in the graph is a {type(found).__name__}, not a number")

    def sizes(self, arguments: Any) -> str:
        """Sizes as one int64 vector."""
        found = [self.size(argument) for argument in arguments]
        if all(isinstance(size, int) for size in found):
            return self.ints(found)
        parts = [self.ints([size]) if isinstance(size, int) else size for size in found]
        return self.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def reshaped(self, name: str, value: Tensor, wanted: Any) -> str:
        """`name` in the shape of `value`; at most one unknown dimension needs no computing."""
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        if shape.count(-1) <= 1:
            return self.op("Reshape", name, self.ints(shape))
        return self.op("Reshape", name, self.sizes(wanted))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def result(node: Any) -> Tensor:
    """The fake tensor that a node gives."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise ModelError(f"the operator {node.target} gives no tensor where one is needed")
    return value


def check_mutation(node: fx.Node) -> None:
    """Writing in place equals making anew unless something else shares the memory."""
    target = node.args[0]
    if not isinstance(target, fx.Node):
        raise ModelError(f"{node.target} writes to something that is no tensor")
    # The chain of views that `target` is the end of: none of them may be read later.
    order = {other: number for number, other in enumerate(node.graph.nodes)}
    chain = [target]
    while _is_view(chain[-1]) and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    base = chain[-1]
    later = any(order[user] > order[node] for link in chain[1:] for user in link.users)
    aliased = any(_is_view(user) and order[user] < order[node] for user in target.users)
    if later or aliased or base.op == "placeholder":
        raise ModelError(
            f"ONNX graphs can't hold {node.target} on memory that is shared: use another backend"
        )


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
    returns = node.target._schema.returns
    return (
        bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    )
