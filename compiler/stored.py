"""A program's structure as JSON, so that a second start needs neither tracing nor the model's code."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from halyard.compiler.graph import WeightRecipe
from halyard.compiler.program import HeadShape, UnboundProgram
from halyard.compiler.segments import AttentionCall, SegmentCall
from halyard.hal.contract import Executable
from halyard.hal.types import WeightInfo

__all__ = ["structure_of", "with_structure"]


def structure_of(program: UnboundProgram) -> dict[str, Any]:
    """All of a program but its executables and constants, in JSON's types."""
    return {
        "num_segments": len(program.executables),
        "calls": [{"kind": type(call).__name__, **asdict(call)} for call in program.calls],
        "result": program.result,
        "hidden": program.hidden,
        "token_axes": program.token_axes,
        "recipes": {name: asdict(recipe) for name, recipe in program.recipes.items()},
        "weights": {name: asdict(info) for name, info in program.weights.items()},
        "heads": asdict(program.heads),
        "vocab_size": program.vocab_size,
    }


def with_structure(
    structure: dict[str, Any], executables: tuple[Executable, ...], constants: dict[str, Tensor]
) -> UnboundProgram:
    """The inverse of structure_of."""
    return UnboundProgram(
        executables=executables,
        calls=tuple(_call(dict(fields)) for fields in structure["calls"]),
        result=structure["result"],
        hidden=structure["hidden"],
        token_axes=tuple(axes) if (axes := structure["token_axes"]) is not None else None,
        recipes={
            name: WeightRecipe(**(fields | {"sources": tuple(fields["sources"])}))
            for name, fields in structure["recipes"].items()
        },
        weights={
            name: WeightInfo(tuple(fields["shape"]), fields["dtype"])
            for name, fields in structure["weights"].items()
        },
        constants=constants,
        heads=HeadShape(**structure["heads"]),
        vocab_size=structure["vocab_size"],
        from_cache=True,
    )


def _call(fields: dict[str, Any]) -> SegmentCall | AttentionCall:
    if fields.pop("kind") == "AttentionCall":
        return AttentionCall(**fields)
    return SegmentCall(fields["segment"], tuple(fields["inputs"]), tuple(fields["outputs"]))
