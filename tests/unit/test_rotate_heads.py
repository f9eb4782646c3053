"""The pass that finds rotary embeddings: what it takes, and what only looks like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from halyard.compiler.graph import ModelGraph, WeightRecipe
from halyard.compiler.pipeline import run_passes
from halyard.hal.kernels.triton.rotary import rotate_pair
from halyard.hal.ops import paged_attention

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 16, 24
PASSES = ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input", "skinny_linears")
FOUND = ["plain", "bias", "one product", "factors swapped", "terms swapped", "nothing left over"]
LEFT_ALONE = [
    "normed", "scaled", "not from a product", "k as it is", "k by other angles", "partial", "x read twice",
    "product read twice", "half read twice", "sum read twice", "result read twice", "sign of the other half",
    "halves not swapped", "neighbours", "unequal parts", "wide angles", "an angle a head", "an angle for all",
    "subtracted", "added twice", "one half twice",
    "something left over", "parts from elsewhere", "parts that overlap",
]  # fmt: skip


class Attention(nn.Module):
    """A layer's way to its attention, in one of many forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embedding = nn.Embedding(100, HIDDEN)
        self.q = nn.Linear(HIDDEN, HEADS * DIM, bias=form == "bias")
        self.k = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=form == "bias")
        self.v = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=form == "bias")
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.angles = nn.Parameter(torch.randn(100, 4 * DIM))

    def forward(self, ids: Tensor, angles: Tensor | None = None) -> tuple[Tensor, ...]:
        hidden = self.embedding(ids)[None]
        if self.form == "one product":
            qkv = self.qkv(hidden)
            ends = (HEADS * DIM, (HEADS + KV_HEADS) * DIM)
            parts = (qkv[..., : ends[0]], qkv[..., ends[0] : ends[1]], qkv[..., ends[1] :])
        else:
            parts = (self.q(hidden), self.k(hidden), self.v(hidden))
        if self.form == "not from a product":
            parts = tuple(torch.tanh(part) for part in parts)
        q, k, v = (part.view(1, ids.shape[0], -1, DIM).transpose(1, 2) for part in parts)
        more: list[Tensor] = []
        if self.form == "product read twice":  # the view, not what is made of it
            heads = parts[0].view(1, ids.shape[0], -1, DIM)
            q, more = heads.transpose(1, 2), [heads.exp()]
        table = (self.angles if angles is None else angles)[ids][None, None]
        if self.form == "wide angles":
            table = table.double()
        cos, sin, cos2, sin2 = (table[..., n * DIM : (n + 1) * DIM] for n in range(4))
        if self.form == "an angle a head":
            cos, sin = cos.expand(1, KV_HEADS, -1, -1), sin.expand(1, KV_HEADS, -1, -1)
            q = q[:, :KV_HEADS]
        if self.form == "an angle for all":
            cos, sin = cos[:, :, :1], sin[:, :, :1]
        if self.form == "normed":
            q, k = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) for x in (q, k))
        if self.form == "scaled":
            q, k = q * 2, k * 2
        q = self.rotated(q, cos, sin, more)
        if self.form == "k by other angles":
            cos, sin = cos2, sin2
        if self.form != "k as it is":
            k = self.rotated(k, cos, sin, [])
        if self.form == "wide angles":
            q, k = q.float(), k.float()
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        if self.form == "result read twice":
            more.append(k.exp())
        return (paged_attention(q, k, v, None, 0, 1.0, 0, 0.0), *more)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor, more: list[Tensor]) -> Tensor:
        form, half = self.form, DIM // 2
        if form == "partial":
            x, rest = x[..., :half], x[..., half:]
            cos, sin, half = cos[..., :half], sin[..., :half], half // 2
        if form == "unequal parts":
            half //= 2
        first, second = x[..., :half], x[..., half:]
        if form == "neighbours":
            first, second = x[..., ::2], x[..., 1::2]
        if form == "one half twice":
            first, second = x[..., :half], x[..., :half]
        if form == "parts from elsewhere":
            second = x[..., 4 : half + 4]
        if form == "parts that overlap":
            first, second = x[..., : half + 2], x[..., half:-2]
        if form == "half read twice":
            more.append(first.exp())
        turned = {
            "sign of the other half": lambda: (second, -first),
            "halves not swapped": lambda: (-first, second),
        }.get(form, lambda: (-second, first))()
        crossed = torch.cat(turned, -1)
        if form == "factors swapped":
            result = cos * x + sin * crossed
        elif form == "terms swapped":
            result = crossed * sin + x * cos
        elif form == "subtracted":
            result = x * cos - crossed * sin
        elif form == "added twice":
            result = torch.add(x * cos, crossed * sin, alpha=2)
        else:
            result = x * cos + crossed * sin
        if form == "x read twice":
            more.append(x.exp())
        if form == "sum read twice":
            more.append(result.exp())
        if form == "nothing left over":
            result = torch.cat((result, x[..., DIM:]), -1)
        if form == "something left over":
            result = torch.cat((result, x[..., 1:3]), -1)
        return torch.cat((result, rest), -1) if form == "partial" else result


def graph_of(model: nn.Module) -> ModelGraph:
    exported = torch.export.export(
        model, (torch.zeros(7, dtype=torch.int64),),
        dynamic_shapes=({0: torch.export.Dim("ntok", min=1, max=64)},), strict=False,
    )  # fmt: skip
    names = exported.graph_signature.inputs_to_parameters
    for node in exported.graph_module.graph.nodes:
        if node.op == "placeholder":
            key = "weight" if node.name in names else "input"
            node.meta[key] = names.get(node.name, "ids")
    graph = ModelGraph(
        exported.graph_module, {name: WeightRecipe((name,)) for name in names.values()}
    )
    graph.clean()
    return graph


class Attended(fx.Interpreter):
    """Runs a graph; attention only keeps what it is given."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is paged_attention:
            self.given = args[:3]
            return args[0]
        return super().call_function(target, args, kwargs)


def attended(graph: ModelGraph, model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    state = dict(model.named_parameters())
    inputs = []
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            name = node.meta.get("weight")
            inputs.append(graph.recipes[name].make([state[s].detach() for s in graph.recipes[name].sources])
                          if name else ids)  # fmt: skip
    interpreter = Attended(graph.module)
    interpreter.run(*inputs)
    return interpreter.given


@pytest.mark.parametrize("form", FOUND)
@pytest.mark.parametrize("passes", [PASSES, ()], ids=["as on a GPU", "alone"])
def test_queries_and_keys_turn_at_once(form: str, passes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Attention(form)
    before, after = graph_of(model), graph_of(model)
    run_passes(after, (*passes, "rotate_heads"))
    targets = [node.target for node in after.module.graph.nodes]
    assert targets.count(rotate_pair) == 1
    assert torch.ops.aten.neg.default not in targets
    attention = next(node for node in after.module.graph.nodes if node.target is paged_attention)
    for tokens in (1, 9):
        ids = torch.arange(3, 3 + tokens)
        found = attended(after, model, ids)
        for got, wanted in zip(found, attended(before, model, ids), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
        for got, node in zip(found[:2], attention.args[:2], strict=True):
            assert got.is_contiguous()
            assert isinstance(node, fx.Node)
            assert node.meta["val"].shape[1:] == got.shape[1:]
            assert node.meta["val"].is_contiguous()


@pytest.mark.parametrize("form", LEFT_ALONE)
def test_what_is_no_rotation_stays(form: str) -> None:
    torch.manual_seed(0)
    graph = graph_of(Attention(form))
    run_passes(graph, PASSES)
    before = graph.module.code
    run_passes(graph, ("rotate_heads",))
    assert graph.module.code == before
    assert paged_attention in [node.target for node in graph.module.graph.nodes]


def test_layers_share_their_angles() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention("plain"), Attention("plain")

        def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
            return (*self.first(ids), *self.second(ids, self.first.angles))

    graph = graph_of(Two())
    run_passes(graph, (*PASSES, "rotate_heads"))
    first, second = (n for n in graph.module.graph.nodes if n.target is rotate_pair)
    assert first.args[2:] == second.args[2:]
    assert first.args[2] is not first.args[3]
