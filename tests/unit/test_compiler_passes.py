"""Each pass on a small graph: what it does to the nodes, and that the numbers stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halyard.compiler.graph import ModelGraph, WeightRecipe
from halyard.compiler.pipeline import PASSES, run_passes
from halyard.hal.errors import ConfigError

aten = torch.ops.aten


class Layer(nn.Module):
    """Three linears of one input, two of another, equal views, and nodes that do nothing."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6, bias=bias)
        self.k = nn.Linear(8, 4, bias=bias)
        self.v = nn.Linear(8, 2, bias=bias)
        self.gate = nn.Linear(12, 5, bias=False)
        self.up = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x.to(torch.float32) * 1.0
        joined = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        joined = joined * table.unsqueeze(1) + table.unsqueeze(1)
        return torch.nn.functional.silu(self.gate(joined)) * self.up(joined)


def traced(bias: bool) -> tuple[ModelGraph, Layer]:
    torch.manual_seed(0)
    layer = Layer(bias).requires_grad_(False)
    tokens = torch.export.Dim("ntok", min=1, max=64)
    exported = torch.export.export(
        layer,
        (torch.randn(3, 8), torch.randn(3)),
        dynamic_shapes=({0: tokens}, {0: tokens}),
        strict=False,
    )
    module = exported.graph_module
    names = exported.graph_signature.inputs_to_parameters
    recipes = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            node.meta["weight"] = names[node.name]
            recipes[names[node.name]] = WeightRecipe((names[node.name],))
        elif node.op == "placeholder":
            node.meta["input"] = node.name
    graph = ModelGraph(module, recipes)
    graph.clean()
    return graph, layer


def count(graph: ModelGraph, target: object) -> int:
    return sum(node.target is target for node in graph.module.graph.nodes)


def run(graph: ModelGraph, layer: Layer, x: Tensor, table: Tensor) -> Tensor:
    state = dict(layer.named_parameters())
    values = {"x": x, "table": table}
    args = []
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            name = graph.weight_of(node)
            if name is None:
                args.append(values[node.name])
            else:
                recipe = graph.recipes[name]
                args.append(recipe.make([state[source].data for source in recipe.sources]))
    found: Tensor = graph.module.forward(*args)[0]
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wanted", [*((name,) for name in PASSES), tuple(PASSES)])
def test_numbers_stay(wanted: tuple[str, ...], bias: bool) -> None:
    graph, layer = traced(bias)
    run_passes(graph, wanted)
    for tokens in (1, 2, 7):
        x, table = torch.randn(tokens, 8), torch.randn(tokens)
        torch.testing.assert_close(run(graph, layer, x, table), layer(x, table))


def test_linears_of_one_input_become_one() -> None:
    graph, _ = traced(bias=True)
    run_passes(graph, ("drop_no_ops", "fuse_linears_of_one_input"))
    assert count(graph, aten.linear.default) == 2
    sources = {recipe.sources for recipe in graph.recipes.values()}
    assert sources == {
        ("q.weight", "k.weight", "v.weight"),
        ("q.bias", "k.bias", "v.bias"),
        ("gate.weight", "up.weight"),
    }


def test_linears_become_skinny_ones_on_the_weights_as_they_are() -> None:
    graph, layer = traced(bias=True)
    run_passes(graph, ("drop_no_ops", "fuse_linears_of_one_input", "skinny_linears"))
    assert count(graph, aten.linear.default) == 0
    assert count(graph, torch.ops.halyard.skinny_linear.default) == 2
    for tokens in (1, 17):
        x, table = torch.randn(tokens, 8), torch.randn(tokens)
        torch.testing.assert_close(run(graph, layer, x, table), layer(x, table))


class Router(nn.Module):
    """topk in the forms that routers have, and in others."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide = torch.cat([x] * 80, -1) + torch.arange(640) * 1e-3
        return (
            *x.topk(3, dim=-1), *x.topk(2, dim=1, sorted=False), *x.topk(2),
            *wide.topk(2), *x.topk(2, largest=False), *x[:1].topk(1, dim=0),
        )  # fmt: skip


def test_routers_choose_by_one_kernel() -> None:
    tokens = torch.export.Dim("ntok", min=2, max=64)
    exported = torch.export.export(
        Router(), (torch.randn(3, 8),), dynamic_shapes=({0: tokens},), strict=False
    )
    graph = ModelGraph(exported.graph_module, {})
    run_passes(graph, ("largest_of_few",))
    assert count(graph, torch.ops.halyard.largest.default) == 3
    assert count(graph, aten.topk.default) == 3  # too wide, the least, along another axis
    x = torch.randn(5, 8)
    for found, expected in zip(graph.module(x), Router()(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_ops_go() -> None:
    graph, _ = traced(bias=False)
    products = count(graph, aten.mul.Tensor)
    assert count(graph, aten.to.dtype) == 1
    run_passes(graph, ("drop_no_ops",))
    assert count(graph, aten.to.dtype) == 0
    assert count(graph, aten._assert_tensor_metadata.default) == 0
    assert count(graph, aten.mul.Tensor) == products - 1


def test_equal_nodes_merge() -> None:
    graph, _ = traced(bias=False)
    assert count(graph, aten.unsqueeze.default) == 2
    run_passes(graph, ("merge_equal_nodes",))
    assert count(graph, aten.unsqueeze.default) == 1


def test_weight_that_something_else_reads_is_left_alone() -> None:
    graph, _ = traced(bias=False)
    nodes = graph.module.graph
    weight = next(n for n in nodes.nodes if graph.weight_of(n) == "gate.weight")
    output = nodes.output_node()
    with nodes.inserting_before(output):
        second = nodes.call_function(aten.neg.default, (weight,))
    output.args = ((*output.args[0], second),)  # type: ignore[misc]
    run_passes(graph, ("fuse_linears_of_one_input",))
    assert graph.recipes["gate.weight"].sources == ("gate.weight",)


def test_dump_has_the_graph_after_each_pass(tmp_path: Path) -> None:
    graph, _ = traced(bias=False)
    run_passes(graph, tuple(PASSES), tmp_path / "graphs")
    names = sorted(file.name for file in (tmp_path / "graphs").iterdir())
    assert names[0] == "00_traced.py"
    assert [name[3:-3] for name in names[1:]] == list(PASSES)
    text = (tmp_path / "graphs" / names[-1]).read_text()
    assert "halyard.packed_linear" in text
    assert "aten.linear" in (tmp_path / "graphs" / names[0]).read_text()
    assert "gate.weight" in text


def test_unknown_pass_is_named() -> None:
    graph, _ = traced(bias=False)
    with pytest.raises(ConfigError, match="fold_universe"):
        run_passes(graph, ("fold_universe",))


def test_dump_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    graph, _ = traced(bias=False)
    with pytest.raises(ConfigError, match="file"):
        run_passes(graph, (), tmp_path / "file" / "graphs")
