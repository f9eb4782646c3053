"""A model's graph while passes work on it: nodes, and how each weight input comes to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

__all__ = ["ModelGraph", "WeightRecipe"]


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """How one weight input is made from the checkpoint's tensors."""

    sources: tuple[str, ...]  # joined along dim 0, in this order
    packed: bool = False  # then rearranged by pack_linear
    bits: int = 0  # 8 or 4: quantised by quantize_linear instead

    def make(self, tensors: list[Tensor]) -> Tensor:
        """Apply the recipe to the tensors of `sources`."""
        # Imported here: both need the C++ library. They join without a joined copy.
        if self.bits:
            from halyard.hal.kernels.native.quantized_linear import quantize_linear

            return quantize_linear(*tensors, bits=self.bits)
        if self.packed:
            from halyard.hal.kernels.native.linear import pack_linear

            return pack_linear(*tensors)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(slots=True)
class ModelGraph:
    """One graph whose placeholders are user inputs (meta["input"]) and weights (meta["weight"])."""

    module: fx.GraphModule
    recipes: dict[str, WeightRecipe]  # by meta["weight"]

    def weight_of(self, node: object) -> str | None:
        """The weight's name if `node` is a weight placeholder."""
        return node.meta.get("weight") if isinstance(node, fx.Node) else None

    def add_weight(self, name: str, recipe: WeightRecipe, example: Tensor) -> fx.Node:
        """A new weight placeholder; `example` is a fake tensor of its shape."""
        graph = self.module.graph
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            node = graph.placeholder("w_" + "".join(c if c.isalnum() else "_" for c in name))
        node.meta.update(weight=name, val=example)
        self.recipes[name] = recipe
        return node

    def clean(self) -> None:
        """Drop dead nodes and weights that nothing reads."""
        graph = self.module.graph
        graph.eliminate_dead_code()
        for node in list(graph.nodes):
            if node.op == "placeholder" and not node.users and "weight" in node.meta:
                del self.recipes[node.meta["weight"]]
                graph.erase_node(node)
        graph.lint()
        self.module.recompile()
