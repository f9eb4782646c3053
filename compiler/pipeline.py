"""The passes, in order. A graph compiler names those it wants; the order is this list's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from halyard.compiler.graph import ModelGraph
from halyard.compiler.passes.add_in_linears import add_in_linears
from halyard.compiler.passes.drop_no_ops import drop_no_ops
from halyard.compiler.passes.experts_apart import experts_apart
from halyard.compiler.passes.fuse_linears_of_one_input import fuse_linears_of_one_input
from halyard.compiler.passes.gate_linears import gate_linears
from halyard.compiler.passes.largest_of_few import largest_of_few
from halyard.compiler.passes.merge_equal_nodes import merge_equal_nodes
from halyard.compiler.passes.prepack_linears import prepack_linears
from halyard.compiler.passes.quantize_linears import (
    quantize_linears_int4,
    quantize_linears_int8,
)
from halyard.compiler.passes.rotate_heads import rotate_heads
from halyard.compiler.passes.skinny_linears import skinny_linears
from halyard.hal.errors import ConfigError

__all__ = ["PASSES", "run_passes"]

PASSES: dict[str, Callable[[ModelGraph], None]] = {
    "drop_no_ops": drop_no_ops,  # what tracing leaves behind
    "merge_equal_nodes": merge_equal_nodes,  # every layer's views of the rotary tables
    "fuse_linears_of_one_input": fuse_linears_of_one_input,  # q, k, v and gate, up: one product each
    "quantize_linears_int8": quantize_linears_int8,  # where asked for: EngineConfig.quantization
    "quantize_linears_int4": quantize_linears_int4,
    "prepack_linears": prepack_linears,  # weights in the order the CPU's linear kernel reads them
    "skinny_linears": skinny_linears,  # kernels of our own where a GPU multiplies few rows
    "add_in_linears": add_in_linears,  # behind it: residual adds happen in the products
    "gate_linears": gate_linears,  # behind those: a feed-forward part's gate, within the product
    "rotate_heads": rotate_heads,  # queries and keys that come from a product: one rotation for both
    "largest_of_few": largest_of_few,  # a router's choice of experts: one kernel
    "experts_apart": experts_apart,  # what they chose is added up with what follows
}


def run_passes(graph: ModelGraph, wanted: Sequence[str], dump_dir: Path | None = None) -> None:
    """Run the wanted passes; with `dump_dir`, write the graph before the first and after each."""
    unknown = sorted(set(wanted) - set(PASSES))
    if unknown:
        raise ConfigError(f"unknown pass {', '.join(unknown)}: known are {', '.join(PASSES)}")
    _dump(graph, dump_dir, 0, "traced")
    for number, (name, transform) in enumerate(PASSES.items(), start=1):
        if name in wanted:
            transform(graph)
            _dump(graph, dump_dir, number, name)


def _dump(graph: ModelGraph, dump_dir: Path | None, number: int, name: str) -> None:
    if dump_dir is None:
        return
    try:
        dump_dir.mkdir(parents=True, exist_ok=True)
        recipes = "\n".join(f"# {key} = {recipe}" for key, recipe in graph.recipes.items())
        text = f"{graph.module.code.strip()}\n\n{recipes}\n"
        (dump_dir / f"{number:02d}_{name}.py").write_text(text)
    except OSError as error:
        raise ConfigError(f"can't write graphs to {dump_dir}: {error}") from error
