"""Operator by operator, the ONNX graph gives what torch gives, for several numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from halyard.compiler.graphs.onnx_segment import segment_model
from halyard.hal.errors import ModelError

pytest.importorskip("onnx", reason='needs pip install "halyard[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "halyard[onnx]"')

Function = Callable[[Tensor, Tensor], Any]


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        return self.function(x, ids)


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    return torch.randn(1, tokens, 12), torch.randint(0, 6, (tokens,))


def model_of(function: Function) -> Any:
    tokens = torch.export.Dim("ntok", min=1, max=4096)
    exported = torch.export.export(
        Module(function), inputs(7), dynamic_shapes=({1: tokens}, {0: tokens}), strict=False
    )
    return segment_model(exported.graph_module)[0]


def check(function: Function) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = model_of(function).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for tokens in (1, 7, 17):
        given = inputs(tokens)
        names = [value.name for value in session.get_inputs()]
        feeds = {name: t.numpy() for name, t in zip(("x0", "x1"), given, strict=True)}
        found = session.run(None, {name: feeds[name] for name in names})
        expected = function(*(tensor.clone() for tensor in given))
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-5, rtol=1e-5)


CASES: dict[str, Function] = {
    "scalars": lambda x, i: (2 - x, x * 3 + 1, 1 / (x.abs() + 1), x.sub(x.sin(), alpha=2)),
    "promotion": lambda x, i: (i * 1.5, i + x[0, :, 0], i / 2, i * 2),
    "functions": lambda x, i: (x.exp(), x.abs().sqrt(), x.tanh(), x.sigmoid(), x.cos(), x.relu()),
    "powers": lambda x, i: (x**2, x.abs() ** 1.5, x.abs().rsqrt(), x**3),
    "gelu": lambda x, i: (F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x)),
    "reductions": lambda x, i: (x.mean(-1, keepdim=True), x.sum(-1), x.sum((0, 2)), x.amax(-1)),
    "softmax": lambda x, i: (x.softmax(-1), x.softmax(1), x.cumsum(1)),
    "clamp": lambda x, i: (x.clamp(-0.5, 0.5), x.clamp(max=0.1), x.clamp(min=0.1)),
    "compare": lambda x, i: (x > 0, x <= x.sin(), i == 3, i < 2.5, ~(x > 0)),
    "where": lambda x, i: (torch.where(x > 0, x, 0.5), x.masked_fill(x < 0, -1.0)),
    "views": lambda x, i: (
        x.view(-1, 3, 4), x.reshape(x.shape[1], 12), x.permute(2, 0, 1), x.transpose(-1, -2),
        x[0].t(), x.unsqueeze(-1), x.squeeze(0), x.view(1, x.shape[1], -1, 4).flatten(1, 2).sum(1),
    ),
    "slices": lambda x, i: (x[..., 3:], x[..., :-2], x[..., 1:9:2], x[:, -1:], x[..., -1]),
    "expand": lambda x, i: (x[:, :, None].expand(-1, -1, 3, -1), x.repeat(2, 1, 1)),
    "interleave": lambda x, i: (x.repeat_interleave(2, dim=-1), x.repeat_interleave(3, dim=1)[:, 1 : x.shape[1] + 1]),
    "joins": lambda x, i: (torch.cat([x, x * 2], -1), torch.stack([x, x + 1], 1)),
    "splits": lambda x, i: (*x.chunk(3, -1), *x.split([2, 10], -1), *x.split(5, -1)),
    "unbind": lambda x, i: x.view(1, -1, 3, 4).unbind(2),
    "pad": lambda x, i: (F.pad(x, (1, 2)), F.pad(x, (0, 1, 0, 0), value=3.0)),
    "gathers": lambda x, i: (
        x[0].t()[i], x.index_select(2, i), x[0].gather(1, i[:, None]), F.embedding(i, x[0, :, :6].t()),
    ),
    "topk": lambda x, i: x.topk(3, dim=-1),
    "scatter": lambda x, i: torch.zeros_like(x[0]).scatter(1, i[:, None], 1.0),
    "products": lambda x, i: (x @ x.transpose(1, 2), torch.bmm(x, x.transpose(1, 2)), x[0] @ x[0].t()),
    "linear": lambda x, i: (F.linear(x, torch.ones(5, 12)), F.linear(x[0], torch.ones(5, 12), torch.ones(5))),
    "made": lambda x, i: (
        torch.arange(x.shape[1]), torch.full((x.shape[1], 2), 0.5), torch.ones_like(x),
        torch.zeros(x.shape[1] * 2).sum(), torch.arange(x.shape[1] + 1)[1:],
    ),
    "casts": lambda x, i: (x.to(torch.float16), i.to(torch.float32), x.half().type_as(x), x.long()),
    "in place": lambda x, i: (x * 2).add_(1).div_(x.abs() + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_as_torch(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "swigluoai"])
@pytest.mark.parametrize("form", ["plain", "biased", "transposed", "interleaved"])
def test_experts(top_k: int, activation: str, form: str) -> None:
    import halyard.hal.kernels.experts  # noqa: F401 - registers the operator

    def function(x: Tensor, ids: Tensor) -> Tensor:
        gate_up = torch.arange(5 * 16 * 12, dtype=torch.float32).sin().view(5, 16, 12)
        down = torch.arange(5 * 12 * 8, dtype=torch.float32).cos().view(5, 12, 8)
        biases = [gate_up.sin().sum(-1), down.sum(-1)] if form != "plain" else [None, None]
        if form == "transposed":
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        # The fifth expert is never chosen.
        weights, chosen = x[0, :, :4].softmax(-1).topk(top_k, dim=-1)
        return torch.ops.halyard.experts(
            x[0], gate_up, down, chosen, weights, activation, *biases, form == "transposed",
            form == "interleaved", 1.7, 0.9 if form in ("biased", "interleaved") else 0.0,
        )  # fmt: skip

    check(function)


def test_writing_to_shared_memory_is_refused() -> None:
    """A view that is written to changes what it is a view of, which the ONNX graph would not do."""

    def through_a_view(x: Tensor, ids: Tensor) -> Tensor:
        made = x * 2
        made[0].add_(1)
        return made * 3

    with pytest.raises(ModelError, match="on memory that is shared"):
        model_of(through_a_view)


def test_unknown_operator_is_named() -> None:
    with pytest.raises(ModelError, match=r"can't hold the operator aten\.erfinv\.default"):
        model_of(lambda x, i: x.erfinv())
