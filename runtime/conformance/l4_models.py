"""L4: a tiny model of every proven family against Hugging Face, layer by layer.

The truth is the model in fp64 with the library's own eager attention. What every attention saw
(queries, keys, values) and gave is compared in order, so a failure names the first layer and
operation that parts; then logits, for packed and chunked prompts, mixed steps and decode.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.hal.conformance.tolerances import LOGITS, limit_for
from halyard.hal.dtypes import torch_dtype
from halyard.hal.types import DType
from halyard.models.spec import ModelSpec
from halyard.models.tiny import MOE_FAMILIES, PROVEN, tiny_model
from halyard.runtime.conformance.recording import OPERATIONS, Steps, compile_model

__all__ = ["cases"]

LENGTHS = (23, 9, 17)
_PROBE = "halyard_probe"


def cases(backend: BackendUnderTest) -> list[Case]:
    """A case for each family and dtype."""
    if not backend.computes:
        return []
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        for family in PROVEN:
            waived = [] if dtype in backend.claimed_dtypes() else [f"dtype {dtype}"]
            if family in MOE_FAMILIES and dtype != "float32":
                waived.append("rounding may choose another expert: not comparable number by number")
            need = ModelSpec.from_hf(_config(family)).requirements(dtype, 16)
            found.append(Case("L4", family, _family, dtype, need, {"family": family},
                              seconds=600.0, waived=tuple(waived)))  # fmt: skip
    return found


@functools.cache
def _config(family: str) -> Any:
    from halyard.models.tiny import tiny_config

    return tiny_config(family)


@dataclass(frozen=True, slots=True)
class _Run:
    """One sequence through Hugging Face: logits, and tensors by (layer, operation)."""

    logits: Tensor  # [tokens, vocab]
    layers: dict[tuple[int, str], Tensor]  # [tokens, heads, dim]


def _hugging_face(model: Any, tokens: list[int]) -> _Run:
    """Run the model with its own eager attention, written down on the way."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers: dict[tuple[int, str], Tensor] = {}

    def probe(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        own = sys.modules[type(module).__module__].eager_attention_forward
        out, weights = own(module, q, k, v, mask, **options)
        seen = (*(x[0].transpose(0, 1) for x in (q, k, v)), out[0])
        for operation, tensor in zip(OPERATIONS, seen, strict=True):
            layers[module.layer_idx, operation] = tensor.detach().clone()
        return out, weights

    ALL_ATTENTION_FUNCTIONS.register(_PROBE, probe)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PROBE, eager_mask)
    model.set_attn_implementation(_PROBE)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one has no fp64
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return _Run(logits, layers)


def _family(context: CaseContext) -> None:
    model = tiny_model(context.case.params["family"])
    spec = ModelSpec.from_hf(model.config)
    generator = random.Random(1)
    sequences = [[generator.randrange(spec.vocab_size) for _ in range(n)] for n in LENGTHS]
    own = copy.deepcopy(model).to(torch_dtype(context.dtype))
    exact = copy.deepcopy(own).double()  # of the rounded weights: only computing may differ
    plain = [_hugging_face(own, tokens) for tokens in sequences]
    truth = [_hugging_face(exact, tokens) for tokens in sequences]

    device, kernels = context.device, context.kernels
    unbound = compile_model(spec, context.dtype, device, context.compiler)
    state = own.state_dict()
    weights = {name: state[name].to(device.torch_device) for name in unbound.weights}
    arguments = (unbound, weights, spec, context.dtype, device, kernels, sequences)

    steps = Steps(*arguments)
    packed = steps.step(dict(enumerate(LENGTHS)))
    _compare_layers(context, steps, truth, plain)
    for row, logits in packed.items():
        _compare_logits(context, logits, truth[row].logits, plain[row].logits, "packed prefill")

    steps = Steps(*arguments)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for counts in (
        {0: 10, 1: 8},  # packed prefill
        {0: 6, 1: 1, 2: 5},  # a chunk beside a decode, and a new one
        {0: 6, 2: 11},
        {0: 1, 2: 1},  # decode
    ):
        for row, logits in steps.step(counts).items():
            parts[row].append(logits)
    for row, own_parts in enumerate(parts):
        found = torch.cat(own_parts)
        count = len(found)
        _compare_logits(
            context, found, truth[row].logits[:count], plain[row].logits[:count], "mixed steps"
        )


def _compare_layers(
    context: CaseContext, steps: Steps, truth: list[_Run], plain: list[_Run]
) -> None:
    starts = [0]
    for length in LENGTHS:
        starts.append(starts[-1] + length)
    for record in steps.kernels.records:
        where = f"layer {record.layer}, {record.operation}"
        for row in range(len(LENGTHS)):
            part = record.tensor[starts[row] : starts[row + 1]]
            exact = truth[row].layers[record.layer, record.operation].view(part.shape)
            own = plain[row].layers[record.layer, record.operation].view(part.shape)
            _judge(context, part, exact, own, where)


def _compare_logits(
    context: CaseContext, found: Tensor, exact: Tensor, own: Tensor, where: str
) -> None:
    _judge(context, found, exact, own, f"logits, {where}")


def _judge(context: CaseContext, found: Tensor, exact: Tensor, own: Tensor, where: str) -> None:
    magnitude = exact.abs().max().item()
    limit = _limit(context.dtype, (own.double() - exact).abs().max().item(), magnitude)
    error = (found.double() - exact).abs()
    context.check(torch.nan_to_num(error, nan=torch.inf).max().item(), limit, where)


def _limit(dtype: DType, honest: float, magnitude: float) -> float:
    if dtype == "float32":
        return LOGITS * max(1.0, magnitude)
    return limit_for(dtype, honest, magnitude)
