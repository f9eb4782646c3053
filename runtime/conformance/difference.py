"""`halyard conformance diff`: one prompt through two backends, and the first place where they part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halyard.hal.conformance.tolerances import LOGITS
from halyard.hal.errors import BackendUnavailableError, RequestError
from halyard.hal.matrix import load_matrix
from halyard.hal.registry import load_part
from halyard.hal.selection import probe_backend
from halyard.hal.types import DType
from halyard.models.tokenizer import load_tokenizer
from halyard.models.weights import load_weights
from halyard.runtime.conformance.recording import Recorded, Steps, compile_model
from halyard.runtime.planner import resolve_model

__all__ = ["Difference", "compare"]

# Of the largest value in the tensor: what a few roundings in a row may add up to.
RELATIVE: dict[str, float] = {"float32": LOGITS, "bfloat16": 0.04, "float16": 0.01}

# Where an operation's result comes from, for people.
SOURCES = {
    "query": "the segment before it: norm, query projection, rotary embedding",
    "key": "the segment before it: norm, key projection, rotary embedding",
    "value": "the segment before it: norm, value projection",
    "attention": "the attention kernel",
    "logits": "the last segment: output projection, MLP, final norm, head",
}


@dataclass(frozen=True, slots=True)
class _Place:
    layer: int | None  # None: the logits
    operation: str
    error: float  # largest absolute difference
    magnitude: float  # of the reference

    @property
    def share(self) -> float:
        return self.error / max(self.magnitude, 1e-12)


@dataclass(frozen=True, slots=True)
class Difference:
    """All places compared, in the order in which they are computed."""

    backend: str
    against: str
    dtype: str
    places: tuple[_Place, ...]
    first: _Place | None  # beyond RELATIVE; None: nowhere

    def lines(self) -> Iterator[str]:
        """The finding, for people."""
        for place in self.places:
            where = "logits" if place.layer is None else f"layer {place.layer} {place.operation}"
            mark = "  <- here they part" if place is self.first else ""
            yield f"{where:<22} difference {place.error:.3e} of {place.magnitude:.3e}{mark}"
        if self.first is None:
            worst = max(place.share for place in self.places)
            yield (
                f"{self.backend} and {self.against} agree in {self.dtype}: at most {worst:.1e} apart, "
                f"relative ({RELATIVE[self.dtype]:.0e} is allowed)"
            )
        else:
            where = "" if self.first.layer is None else f"layer {self.first.layer}, "
            yield (
                f"{self.backend} parts from {self.against} at {where}{self.first.operation}: look at "
                f"{SOURCES[self.first.operation]}"
            )


def compare(
    model: str,
    backend: str,
    against: str,
    *,
    prompt: str,
    token_ids: Sequence[int] | None = None,
    dtype: str = "auto",
    matrix: Path | None = None,
) -> Difference:
    """Run one prompt, in one step, through both.

    Raises:
        HalyardError: a backend can't run here, or the model can't be read.
    """
    source, spec = resolve_model(model)
    if source is None:
        raise AssertionError("a model by name has a source")
    rows = [load_matrix(matrix).row(name) for name in (backend, against)]
    for row in rows:
        report = probe_backend(row)
        if report.reasons:
            raise BackendUnavailableError(f"{row.name} can't run here: {'; '.join(report.reasons)}")
    common = [d for d in rows[0].dtypes if d in rows[1].dtypes]
    chosen: DType = "float32" if dtype == "auto" else dtype  # type: ignore[assignment]
    if chosen not in common:
        raise RequestError(f"{backend} and {against} have no {chosen} in common", "dtype")
    tokens = list(token_ids or ())
    if not tokens:
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer: give --token-ids", "prompt")
        tokens = tokenizer.encode(prompt)
    runs = []
    for row in rows:
        device: Any = load_part("devices", row.device)()
        try:
            kernels = load_part("kernels", row.kernels)(device)
            unbound = compile_model(spec, chosen, device, load_part("graphs", row.graph)())
            weights = load_weights(source, spec, unbound.weights, chosen)
            there = {name: tensor.to(device.torch_device) for name, tensor in weights.items()}
            steps = Steps(unbound, there, spec, chosen, device, kernels, [tokens])
            logits = steps.step({0: len(tokens)})[0]
            runs.append((steps.kernels.records, logits))
        finally:
            device.close()
    places = list(_places(*runs))
    allowed = RELATIVE[chosen]
    first = next((p for p in places if not p.share <= allowed), None)
    return Difference(backend, against, chosen, tuple(places), first)


def _places(
    one: tuple[list[Recorded], Tensor], other: tuple[list[Recorded], Tensor]
) -> Iterator[_Place]:
    for mine, theirs in zip(one[0], other[0], strict=True):
        yield _place(mine.layer, mine.operation, mine.tensor, theirs.tensor)
    yield _place(None, "logits", one[1], other[1])


def _place(layer: int | None, operation: str, found: Tensor, expected: Tensor) -> _Place:
    error = torch.nan_to_num((found.double() - expected.double()).abs(), nan=torch.inf)
    return _Place(layer, operation, error.max().item(), expected.double().abs().max().item())
