"""The prepack pass: same numbers, one copy of a tied embedding."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from halyard.compiler.graph import ModelGraph, WeightRecipe
from halyard.compiler.passes.prepack_linears import prepack_linears
from halyard.compiler.passes.quantize_linears import quantize_linears_int4, quantize_linears_int8
from halyard.compiler.pipeline import run_passes
from halyard.hal.kernels.native.embedding import packed_embedding
from halyard.hal.kernels.native.library import find_compiler
from halyard.hal.kernels.native.linear import (
    gated_linear,
    pack_linear,
    packed_linear,
    unpack_linear,
)
from halyard.hal.kernels.native.quantized_linear import quantized_embedding, quantized_linear
from halyard.hal.kernels.triton.gated import gated_product

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.middle = nn.Linear(32, 32, bias=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.embedding(ids))
        return nn.functional.linear(hidden, self.embedding.weight)


def graph_of(model: nn.Module) -> ModelGraph:
    exported = torch.export.export(
        model, (torch.zeros(5, dtype=torch.int64),),
        dynamic_shapes=({0: torch.export.Dim("ntok", min=1, max=64)},), strict=False,
    )  # fmt: skip
    module = exported.graph_module
    names = exported.graph_signature.inputs_to_parameters
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                node.meta["weight"] = names[node.name]
            else:
                node.meta["input"] = "ids"
    recipes = {name: WeightRecipe((name,)) for name in names.values()}
    return ModelGraph(module, recipes)


def run(graph: ModelGraph, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    state = dict(model.named_parameters())
    arguments = []
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            name = node.meta.get("weight")
            recipe = graph.recipes[name] if name else None
            sources = [state[source].detach() for source in recipe.sources] if recipe else []
            arguments.append(recipe.make(sources) if recipe else ids)
    found = graph.module(*arguments)
    return found[0] if isinstance(found, tuple | list) else found


def test_packed_graph_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Tied()
    graph = graph_of(model)
    prepack_linears(graph)
    targets = [node.target for node in graph.module.graph.nodes]
    assert targets.count(packed_linear) == 2
    assert targets.count(packed_embedding) == 1
    assert torch.ops.aten.linear.default not in targets
    ids = torch.randint(0, 100, (7,))
    found = run(graph, model, ids)
    torch.testing.assert_close(found, model(ids), atol=1e-5, rtol=1e-5)
    packed = [name for name, recipe in graph.recipes.items() if recipe.packed]
    assert sorted(packed) == ["embedding.weight", "middle.weight"]


def test_a_weight_with_another_reader_stays_plain() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = ids.float()[:, None].expand(-1, 16)
            return nn.functional.linear(x, self.weight) + self.weight.sum()

    graph = graph_of(Scaled())
    prepack_linears(graph)
    assert not any(recipe.packed for recipe in graph.recipes.values())
    assert isinstance(graph.module, fx.GraphModule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1,), (64, 3), (128, 64, 70), (70, 30)])
def test_packing_joins_and_can_be_undone(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    parts = [torch.randn(size, 34).to(dtype) for size in sizes]
    packed = pack_linear(*parts)
    assert torch.equal(unpack_linear(packed, sum(sizes)), torch.cat(parts))
    rest = unpack_linear(packed, len(packed) * 64)[sum(sizes) :]
    assert torch.equal(rest, torch.zeros_like(rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 100])
def test_packed_embedding_gathers_rows(dtype: torch.dtype, rows: int) -> None:
    matrix = torch.randn(rows, 24).to(dtype)
    ids = torch.randint(0, rows, (2, 5))
    assert torch.equal(packed_embedding(ids, pack_linear(matrix), 24), matrix[ids])


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 128)
        self.middle = nn.Linear(128, 96)
        self.odd = nn.Linear(96, 128)  # no group divides its inputs

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.odd(self.middle(self.embedding(ids)))
        return nn.functional.linear(hidden, self.embedding.weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_only_what_can_be_quantised(bits: int) -> None:
    graph = graph_of(Mixed())
    (quantize_linears_int8 if bits == 8 else quantize_linears_int4)(graph)
    prepack_linears(graph)
    targets = [node.target for node in graph.module.graph.nodes]
    assert targets.count(quantized_linear) == 2
    assert targets.count(quantized_embedding) == 1
    assert targets.count(packed_linear) == 1  # the odd one
    assert graph.recipes["middle.weight"].bits == bits
    assert graph.recipes["odd.weight"].bits == 0
    assert graph.recipes["embedding.weight"].bits == bits


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_graph_computes_nearly_the_same(bits: int) -> None:
    torch.manual_seed(0)
    model = Mixed()
    graph = graph_of(model)
    (quantize_linears_int8 if bits == 8 else quantize_linears_int4)(graph)
    prepack_linears(graph)
    wanted, found = model(torch.arange(100)), run(graph, model, torch.arange(100))
    loss = (found - wanted).norm() / wanted.norm()
    assert 0 < loss < (0.02 if bits == 8 else 0.15)


class FeedForward(nn.Module):
    """gate and up as two linears or as the chunks of one, the activation by name."""

    def __init__(self, form: str, activation: str, size: int = 128) -> None:
        super().__init__()
        self.form, self.activation = form, activation
        self.embedding = nn.Embedding(100, 32)
        self.gate = nn.Linear(32, size, bias=form == "bias")
        self.up = nn.Linear(32, size, bias=form == "bias")
        self.both = nn.Linear(32, 2 * size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        if self.form == "chunk":
            gate, up = self.both(x).chunk(2, dim=-1)
        elif self.form == "swapped chunk":
            up, gate = self.both(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        active = {
            "silu": nn.functional.silu,
            "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
            "gelu by erf": nn.functional.gelu,
        }[self.activation](gate)
        product = up * active if self.form == "swapped factors" else active * up
        return product + gate if self.form == "second reader" else product


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu by erf"])
@pytest.mark.parametrize(
    "form", ["two", "chunk", "swapped factors", "swapped chunk", "bias", "second reader"]
)
def test_gates_join_their_product_where_nobody_else_reads_it(form: str, activation: str) -> None:
    torch.manual_seed(0)
    model = FeedForward(form, activation)
    graph = graph_of(model)
    run_passes(graph, ("fuse_linears_of_one_input", "prepack_linears", "gate_linears"))
    targets = [node.target for node in graph.module.graph.nodes]
    joins = form in ("two", "chunk", "swapped factors") and activation != "gelu by erf"
    assert targets.count(gated_linear) == joins
    assert (packed_linear in targets) != joins
    ids = torch.randint(0, 100, (7,))
    torch.testing.assert_close(run(graph, model, ids), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu by erf"])
@pytest.mark.parametrize("form", ["two", "chunk", "swapped factors", "bias", "second reader"])
def test_gates_join_a_gpus_product_too(form: str, activation: str) -> None:
    torch.manual_seed(0)
    model = FeedForward(form, activation, size=96)  # no whole panels: nothing is packed there
    graph = graph_of(model)
    run_passes(graph, ("fuse_linears_of_one_input", "skinny_linears", "gate_linears"))
    targets = [node.target for node in graph.module.graph.nodes]
    joins = form in ("two", "chunk", "swapped factors") and activation != "gelu by erf"
    assert targets.count(gated_product) == joins
    ids = torch.randint(0, 100, (7,))
    torch.testing.assert_close(run(graph, model, ids), model(ids), atol=1e-5, rtol=1e-5)


def test_gates_of_half_panels_stay_apart() -> None:
    graph = graph_of(FeedForward("two", "silu", size=96))
    run_passes(graph, ("fuse_linears_of_one_input", "prepack_linears", "gate_linears"))
    assert gated_linear not in [node.target for node in graph.module.graph.nodes]
