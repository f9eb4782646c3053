"""Mixture-of-experts layers of transformers, sent to `halyard::experts`.

The library's own forms either branch on the data (not traceable) or gather whole expert matrices a
token (not affordable).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halyard.hal.errors import ModelError
from halyard.hal.kernels.experts import ACTIVATIONS, SWIGLUOAI, Gate, experts, gated

__all__ = ["NAME", "install"]

NAME = "halyard_experts"


def _gate_of(module: Any) -> Gate | None:
    """Which known gate is the experts', found by its values. None: it is another one.

    Raises:
        ModelError: it is the usual one, with an activation that nobody knows.
    """
    # Numbers beyond any limit, too: one that isn't seen would be left out.
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 4, 24, device="cpu")[:, None]
    probe = torch.randn(24, 64, generator=generator, device="cpu") * scales
    limits = {float(getattr(module, name, None) or 0.0) for name in ("limit", "swiglu_limit")}
    alpha = getattr(module, "alpha", None) or getattr(module, "swiglu_alpha", None) or 1.0
    forms = [
        Gate(name, interleaved, float(alpha) if name == SWIGLUOAI else 1.0, limit)
        for name in (*ACTIVATIONS, SWIGLUOAI)
        for interleaved in (False, True)
        for limit in sorted({0.0, *limits})
    ]
    found = module._apply_gate(probe)
    for form in forms:
        wanted = gated(probe, form.activation, form.interleaved, form.alpha, form.limit)
        if torch.allclose(found, wanted, rtol=1e-4, atol=1e-6):
            return form
    if type(module)._apply_gate.__name__ == "_default_apply_gate":
        raise ModelError(f"experts with activation {module.act_fn} can't be served yet")
    return None


def _forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    gate: Gate | None = getattr(module, "_halyard_gate", None)
    if gate is None or getattr(module, "has_post_expert_norm", False):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        general: Tensor = ALL_EXPERTS_FUNCTIONS["batched_mm"](
            module, hidden, top_k_index, top_k_weights
        )
        return general
    biased = getattr(module, "has_bias", False)
    out: Tensor = experts(
        hidden,
        module.gate_up_proj,
        module.down_proj,
        top_k_index,
        top_k_weights,
        gate.activation,
        gate_up_bias=module.gate_up_proj_bias if biased else None,
        down_bias=module.down_proj_bias if biased else None,
        transposed=getattr(module, "is_transposed", False),
        interleaved=gate.interleaved,
        alpha=gate.alpha,
        limit=gate.limit,
    )
    return out


def install(model: Any) -> None:
    """Route the experts of a transformers model through this operator. Does nothing without any."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    if not model._can_set_experts_implementation():
        return
    # The public setter only takes names that the library ships; the interface itself takes any.
    model.config._experts_implementation = NAME
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate"):
            module._halyard_gate = _gate_of(module)
