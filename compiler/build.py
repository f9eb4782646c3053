"""From a traceable model to a compiled program: trace, passes, segments, executables."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from halyard.compiler.graph import ModelGraph, WeightRecipe
from halyard.compiler.pipeline import run_passes
from halyard.compiler.program import HeadShape, UnboundProgram
from halyard.compiler.segments import split
from halyard.compiler.trace import trace
from halyard.hal.contract import GraphCompiler
from halyard.hal.types import DeviceInfo

__all__ = ["build_program"]


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """A graph is hundreds of thousands of objects that stay: looking for garbage among them again and
    again takes a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_at_rest()
def build_program(
    model: nn.Module,
    constants: Mapping[str, Tensor],
    compiler: GraphCompiler,
    device: DeviceInfo,
    *,
    name: str,
    heads: HeadShape,
    windows: Sequence[int],
    vocab_size: int,
    dtype: str,
    torch_device: torch.device,
    quantization: str = "none",
    dump_dir: Path | None = None,
    progress: bool = False,
) -> UnboundProgram:
    """Compile a model without its weights. Arguments as for `trace`, errors too."""
    traced = trace(model, constants, name=name, heads=heads, windows=windows, device=torch_device)
    recipes = {key: WeightRecipe((key,)) for key in (*traced.weights, *traced.constants)}
    graph = ModelGraph(traced.module, recipes)
    graph.clean()
    extra = () if quantization == "none" else (f"quantize_linears_{quantization}",)
    run_passes(graph, (*compiler.passes(device, dtype), *extra), dump_dir)
    segmented = split(graph)
    examples = [
        (
            segment.module,
            [n.meta["val"] for n in segment.module.graph.nodes if n.op == "placeholder"],
        )
        for segment in segmented.segments
    ]
    with tqdm(
        total=len(examples),
        desc="Compiling",
        unit="segment",
        dynamic_ncols=True,
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        if hasattr(compiler, "compile_all"):  # optional: several at once
            executables = compiler.compile_all(examples, device, bar.update)
        else:
            executables = []
            for module, inputs in examples:
                executables.append(compiler.compile(module, inputs, device))
                bar.update()
    needed = {source for recipe in graph.recipes.values() for source in recipe.sources}
    return UnboundProgram(
        executables=tuple(executables),
        calls=segmented.calls,
        result=segmented.result,
        hidden=segmented.hidden,
        token_axes=segmented.token_axes,
        recipes=graph.recipes,
        weights={key: info for key, info in traced.weights.items() if key in needed},
        constants={key: value for key, value in traced.constants.items() if key in needed},
        heads=heads,
        vocab_size=vocab_size,
    )
