"""Translations of arithmetic: element by element, reductions, products, comparisons, casts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from halyard.compiler.graphs.onnx_graph import numpy_dtype
from halyard.compiler.graphs.onnx_translate import Translator, argument, handler, result
from halyard.hal.errors import ModelError

__all__: list[str] = []

_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}
_UNARY = {
    "neg": "Neg", "cos": "Cos", "sin": "Sin", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs", "erf": "Erf", "floor": "Floor",
    "reciprocal": "Reciprocal", "softplus": "Softplus",
}  # fmt: skip
_COMPARED = {
    "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip


def _names(stem: str, *overloads: str) -> list[str]:
    return [f"aten.{stem}.{o}" for o in overloads] + [f"aten.{stem}_.{o}" for o in overloads]


def _stem(node: fx.Node) -> str:
    return str(node.target).split(".")[1].removesuffix("_")


@handler(*(name for stem in _BINARY for name in _names(stem, "Tensor", "Scalar")))
def _binary(t: Translator, node: fx.Node) -> str:
    dtype = result(node).dtype
    if _stem(node) == "mul":
        for factor, other in (node.args[:2], node.args[1::-1]):
            if isinstance(factor, fx.Node) and str(factor.target) == "aten.rsqrt.default":
                # The form that runtimes know as a norm: they make one operator of it.
                root = t.op("Sqrt", t.tensor(factor.args[0], dtype))
                return t.op("Div", t.tensor(other, dtype), root)
    right = t.tensor(node.args[1], dtype)
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        right = t.op("Mul", right, t.tensor(alpha, dtype))
    return t.op(_BINARY[_stem(node)], t.tensor(node.args[0], dtype), right)


@handler("aten.rsub.Scalar")
def _rsub(t: Translator, node: fx.Node) -> str:
    dtype = result(node).dtype
    return t.op("Sub", t.tensor(node.args[1], dtype), t.tensor(node.args[0], dtype))


@handler(*(name for stem in _UNARY for name in _names(stem, "default")))
def _unary(t: Translator, node: fx.Node) -> str:
    return t.op(_UNARY[_stem(node)], t.tensor(node.args[0], result(node).dtype))


@handler("aten.rsqrt.default")
def _rsqrt(t: Translator, node: fx.Node) -> str:
    return t.op("Reciprocal", t.op("Sqrt", t.tensor(node.args[0])))


@handler("aten.silu.default", "aten.silu_.default")
def _silu(t: Translator, node: fx.Node) -> str:
    source = t.tensor(node.args[0])
    return t.op("Mul", source, t.op("Sigmoid", source))


@handler("aten.gelu.default")
def _gelu(t: Translator, node: fx.Node) -> str:
    approximate = node.kwargs.get("approximate", "none")
    return t.op("Gelu", t.tensor(node.args[0]), approximate=approximate)


@handler("aten.pow.Tensor_Scalar")
def _pow(t: Translator, node: fx.Node) -> str:
    dtype = result(node).dtype
    return t.op("Pow", t.tensor(node.args[0], dtype), t.tensor(node.args[1], dtype))


@handler("aten.mean.dim", "aten.mean.default", "aten.sum.dim_IntList", "aten.sum.default",
         "aten.amax.default")  # fmt: skip
def _reduce(t: Translator, node: fx.Node) -> str:
    kind = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax"}[_stem(node)]
    dims = argument(node, 1, "dim")
    axes = t.ints(list(dims)) if dims else ""
    keep = argument(node, 2, "keepdim", False)
    return t.op(kind, t.tensor(node.args[0], result(node).dtype), axes, keepdims=int(keep))


@handler("aten.softmax.int", "aten._softmax.default")
def _softmax(t: Translator, node: fx.Node) -> str:
    axis: Any = node.args[1]
    return t.op("Softmax", t.tensor(node.args[0], result(node).dtype), axis=axis)


@handler("aten.cumsum.default")
def _cumsum(t: Translator, node: fx.Node) -> str:
    return t.op("CumSum", t.tensor(node.args[0], result(node).dtype), t.ints(node.args[1]))


@handler("aten.clamp.default", "aten.clamp_.default", "aten.clamp_min.default")
def _clamp(t: Translator, node: fx.Node) -> str:
    dtype = result(node).dtype
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    bounds = ["" if bound is None else t.tensor(bound, dtype) for bound in (low, high)]
    return t.op("Clip", t.tensor(node.args[0], dtype), *bounds)


@handler("aten.linear.default")
def _linear(t: Translator, node: fx.Node) -> str:
    # Gemm reads the weight as torch stores it; MatMul would want it transposed.
    source, value = t.tensor(node.args[0]), result(node)
    out_features, in_features = result(node.args[1]).shape
    if value.dim() != 2:
        source = t.op("Reshape", source, t.ints([-1, int(in_features)]))
    operands = [source, t.tensor(node.args[1])]
    if (bias := argument(node, 2, "bias")) is not None:
        operands.append(t.tensor(bias))
    product = t.op("Gemm", *operands, transB=1)
    if value.dim() == 2:
        return product
    leading = [size if isinstance(size, int) else -1 for size in value.shape[:-1]]
    if leading.count(-1) > 1:
        raise ModelError("ONNX graphs can't hold a linear over several unknown dimensions")
    return t.op("Reshape", product, t.ints([*leading, int(out_features)]))


@handler("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def _matmul(t: Translator, node: fx.Node) -> str:
    return t.op("MatMul", t.tensor(node.args[0]), t.tensor(node.args[1]))


@handler(*(f"aten.{stem}.{o}" for stem in _COMPARED for o in ("Tensor", "Scalar")))
def _compare(t: Translator, node: fx.Node) -> str:
    left = result(node.args[0])
    other: Any = node.args[1]
    right = other.meta["val"] if isinstance(other, fx.Node) else other
    dtype = torch.result_type(left, right)
    return t.op(_COMPARED[_stem(node)], t.tensor(node.args[0], dtype), t.tensor(other, dtype))


@handler("aten.bitwise_not.default", "aten.logical_not.default")
def _not(t: Translator, node: fx.Node) -> str:
    return t.op("Not", t.tensor(node.args[0], torch.bool))


@handler("aten.bitwise_and.Tensor", "aten.logical_and.default", "aten.__and__.Tensor")
def _and(t: Translator, node: fx.Node) -> str:
    return t.op("And", t.tensor(node.args[0], torch.bool), t.tensor(node.args[1], torch.bool))


@handler("aten.masked_fill.Scalar", "aten.masked_fill_.Scalar")
def _masked_fill(t: Translator, node: fx.Node) -> str:
    dtype = result(node).dtype
    mask = t.tensor(node.args[1])
    return t.op("Where", mask, t.tensor(node.args[2], dtype), t.tensor(node.args[0], dtype))


@handler("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def _where(t: Translator, node: fx.Node) -> str:
    dtype = result(node).dtype
    chosen = [t.tensor(arg, dtype) for arg in node.args[1:3]]
    return t.op("Where", t.tensor(node.args[0], torch.bool), *chosen)


@handler("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default",
         "aten.type_as.default")  # fmt: skip
def _cast(t: Translator, node: fx.Node) -> str:
    return t.tensor(node.args[0], result(node).dtype)


@handler("aten.full_like.default", "aten.zeros_like.default", "aten.ones_like.default")
def _filled_like(t: Translator, node: fx.Node) -> str:
    stem = _stem(node)
    fill = 0 if stem == "zeros_like" else 1 if stem == "ones_like" else node.args[1]
    shape = t.op("Shape", t.tensor(node.args[0]))
    return t.op("Expand", t.tensor(fill, result(node).dtype), shape)


@handler("aten.full.default", "aten.zeros.default", "aten.ones.default")
def _filled(t: Translator, node: fx.Node) -> str:
    stem = _stem(node)
    fill = 0 if stem == "zeros" else 1 if stem == "ones" else node.args[1]
    return t.op("Expand", t.tensor(fill, result(node).dtype), t.sizes(node.args[0]))


@handler("aten.scalar_tensor.default")
def _scalar(t: Translator, node: fx.Node) -> str:
    return t.tensor(node.args[0], result(node).dtype)


@handler("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(t: Translator, node: fx.Node) -> str:
    dtype = result(node).dtype
    bounds = node.args if len(node.args) > 1 else (0, *node.args)
    start, stop, step = (*bounds, 1)[:3]
    return t.op("Range", t.tensor(start, dtype), t.tensor(stop, dtype), t.tensor(step, dtype))


@handler("aten._assert_tensor_metadata.default")
def _nothing(t: Translator, node: fx.Node) -> None:
    return None


@handler("aten.lift_fresh_copy.default")
def _literal(t: Translator, node: fx.Node) -> str:
    return t.tensor(node.args[0])


def smallest(dtype: torch.dtype) -> float:
    """The least finite number of a dtype: what hides a score, where infinity would make NaN."""
    return float(np.finfo(numpy_dtype(dtype)).min)
