"""Mixture-of-experts layers as one opaque operator, so that graphs don't depend on the routing.

transformers' own forms either branch on the data (not traceable) or gather whole expert matrices a
token (not affordable). This one sorts tokens by expert and runs each expert once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from halyard.hal.errors import ModelError
from halyard.hal.ops import NAMESPACE

__all__ = ["NAME", "install"]

NAME = "halyard_experts"

_MIN_SHARED_WORK = (
    1 << 19
)  # weights of the chosen experts' second matrices: below, one thread's work
_NOTHING = torch.empty(0)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "experts(Tensor hidden, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights, "
    "str activation) -> Tensor"
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def _experts(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
) -> Tensor:
    """Sum over each token's chosen experts of weight * down(act(gate(x)) * up(x)).

    Args:
        hidden: [tokens, hidden_size].
        gate_up: [experts, 2 * width, hidden_size], gate rows first.
        down: [experts, hidden_size, width].
        expert_ids, weights: [tokens, top_k].
    """
    act = _ACTIVATIONS[activation]
    top_k = expert_ids.shape[1]
    order = expert_ids.reshape(-1).argsort(stable=True)
    counts = torch.bincount(expert_ids.reshape(-1), minlength=gate_up.shape[0]).tolist()
    tokens = order // top_k
    scale = weights.reshape(-1)[order]
    chosen: list[tuple[int, Tensor, Tensor]] = []  # expert, its tokens, their weights
    start = 0
    for expert, count in enumerate(counts):
        if count:
            piece = slice(start, start + count)
            chosen.append((expert, tokens[piece], scale[piece, None]))
        start += count

    def one(expert: int, own: Tensor, scale: Tensor) -> Tensor:
        gate, up = F.linear(hidden[own], gate_up[expert]).chunk(2, dim=-1)
        return (F.linear(act(gate) * up, down[expert]) * scale).to(hidden.dtype)

    out = torch.zeros_like(hidden)
    threads = min(_num_threads(), len(chosen)) if hidden.device.type == "cpu" else 1
    if threads < 2 or len(chosen) * down[0].numel() < _MIN_SHARED_WORK:
        for expert, own, weight in chosen:
            out.index_add_(0, own, one(expert, own, weight))
        return out
    for (_, own, _), result in zip(chosen, _shared(one, chosen, threads), strict=True):
        out.index_add_(0, own, result)
    return out


def _num_threads() -> int:
    """How many threads take experts in turn: as many as were taken from torch, else torch's do."""
    from halyard.hal.kernels.native.library import num_threads

    return num_threads() if torch.get_num_threads() == 1 else 1


def _shared(one: Callable[..., Tensor], jobs: list[Any], threads: int) -> list[Tensor]:
    """`one(*job)` for each job, by this thread and some that sleep in between: none waits in a loop."""
    results: list[Tensor] = [_NOTHING] * len(jobs)
    numbers = iter(range(len(jobs)))  # the interpreter hands out one at a time
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference):
            for number in numbers:
                results[number] = one(*jobs[number])

    others = [_workers(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for other in others:
            other.result()
    return results


@cache
def _workers(count: int) -> ThreadPoolExecutor:
    # Each has a count of its own: the library would start as many threads as there are cores in each.
    return ThreadPoolExecutor(count, "halyard-experts", torch.set_num_threads, (1,))


_library.impl("experts", _experts, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::experts", lib=_library)
def _experts_fake(
    hidden: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activation: str,
) -> Tensor:
    return torch.empty_like(hidden)


def _activation_name(module: Any) -> str:
    """Which known function the experts' activation is, found by its values."""
    probe = torch.tensor([-1.5, -0.3, 0.7, 2.0], device="cpu")
    found = module.act_fn(probe)
    for name, function in _ACTIVATIONS.items():
        if torch.allclose(found, function(probe), atol=1e-6):
            return name
    raise ModelError(f"experts with activation {module.act_fn} can't be served yet")


def _forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    plain = (
        getattr(module, "has_gate", True)
        and not getattr(module, "has_bias", False)
        and not getattr(module, "is_transposed", False)
        and getattr(module, "is_concatenated", True)
        and not getattr(module, "has_post_expert_norm", False)
        and type(module)._apply_gate.__name__ == "_default_apply_gate"  # type: ignore[attr-defined]
    )
    if not plain:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        general: Tensor = ALL_EXPERTS_FUNCTIONS["batched_mm"](
            module, hidden, top_k_index, top_k_weights
        )
        return general
    out: Tensor = torch.ops.halyard.experts.default(
        hidden,
        module.gate_up_proj,
        module.down_proj,
        top_k_index,
        top_k_weights,
        module._halyard_activation,
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
        if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn"):
            module._halyard_activation = _activation_name(module)
