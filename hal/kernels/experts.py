"""halyard::experts: a mixture of experts as one opaque operator, so that graphs don't depend on the routing.

Here is what runs anywhere: tokens are sorted by expert and each expert that was chosen runs once. On a
GPU the Triton kernels take its place (`triton/experts.py`), which need nothing from the host.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from halyard.hal import fallbacks
from halyard.hal.ops import NAMESPACE

__all__ = ["ACTIVATIONS", "SWIGLUOAI", "Gate", "expert_parts", "experts", "gated"]

SWIGLUOAI = "swigluoai"
"""gpt-oss's, the one that is no function of the gate alone: see `gated`."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

_MIN_SHARED_WORK = (
    1 << 19
)  # weights of the chosen experts' second matrices: below, one thread's work
_NOTHING = torch.empty(0)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ARGUMENTS = (
    "Tensor hidden, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights, str activation, "
    "Tensor? gate_up_bias=None, Tensor? down_bias=None, bool transposed=False, bool interleaved=False, "
    "float alpha=1.0, float limit=0.0"
)
_library.define(f"experts({_ARGUMENTS}) -> Tensor")
_library.define(f"expert_parts({_ARGUMENTS}) -> Tensor")


@dataclass(frozen=True, slots=True)
class Gate:
    """What becomes of a first product: the arguments of `gated`."""

    activation: str
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0


def gated(both: Tensor, activation: str, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """act(gate) * up of [..., 2 * width], in its dtype.

    "swigluoai": gate * sigmoid(alpha * gate) * (up + 1). With a limit above 0 gate and up are held below
    it first, and up above its negative.
    """
    gate, up = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, dim=-1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == SWIGLUOAI:
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return ACTIVATIONS[activation](gate) * up


@dataclass(frozen=True, slots=True)
class _Mixture:
    """The operators' arguments."""

    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    expert_ids: Tensor
    weights: Tensor
    activation: str
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0

    def results(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(token, choice) pairs of each expert that was chosen, and what it makes of their tokens."""
        order = self.expert_ids.reshape(-1).argsort(stable=True)
        counts = torch.bincount(self.expert_ids.reshape(-1), minlength=self.gate_up.shape[0])
        jobs: list[tuple[int, Tensor]] = []
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                jobs.append((expert, order[start : start + count]))
            start += count
        threads = min(_num_threads(), len(jobs)) if self.hidden.device.type == "cpu" else 1
        if threads < 2 or len(jobs) * self.down[0].numel() < _MIN_SHARED_WORK:
            for expert, pairs in jobs:
                yield pairs, self._one(expert, pairs)
            return
        for (_, pairs), made in zip(jobs, _shared(self._one, jobs, threads), strict=True):
            yield pairs, made

    def _one(self, expert: int, pairs: Tensor) -> Tensor:
        rows = self.hidden[pairs // self.expert_ids.shape[1]]
        both = self._product(rows, self.gate_up, self.gate_up_bias, expert)
        inner = gated(both, self.activation, self.interleaved, self.alpha, self.limit)
        made = self._product(inner, self.down, self.down_bias, expert)
        return (made * self.weights.reshape(-1)[pairs, None]).to(self.hidden.dtype)

    def _product(self, x: Tensor, matrices: Tensor, biases: Tensor | None, expert: int) -> Tensor:
        matrix = matrices[expert].T if self.transposed else matrices[expert]
        return F.linear(x, matrix, None if biases is None else biases[expert])


def _experts(*given: Any, **named: Any) -> Tensor:
    mixture = _Mixture(*given, **named)
    out = torch.zeros_like(mixture.hidden)
    for pairs, made in mixture.results():
        out.index_add_(0, pairs // mixture.expert_ids.shape[1], made)
    return out


def _expert_parts(*given: Any, **named: Any) -> Tensor:
    mixture = _Mixture(*given, **named)
    tokens, top_k = mixture.expert_ids.shape
    out = mixture.hidden.new_empty((tokens * top_k, mixture.hidden.shape[1]))
    for pairs, made in mixture.results():
        out[pairs] = made
    return out.view(tokens, top_k, -1)


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


@cache
def _kernels() -> Any:
    """Those for GPUs; None: this Triton lacks what they need."""
    try:
        return importlib.import_module("halyard.hal.kernels.triton.experts")
    except ImportError as error:
        fallbacks.note("experts", f"the library multiplies, one expert after the other: {error}")
        return None


def _expert_parts_gpu(*given: Any, **named: Any) -> Tensor:
    kernels = _kernels()
    made: Tensor = (kernels.expert_parts if kernels else _expert_parts)(*given, **named)
    return made


def _experts_gpu(*given: Any, **named: Any) -> Tensor:
    return _expert_parts_gpu(*given, **named).sum(1) if _kernels() else _experts(*given, **named)


_library.impl("experts", _experts, "CompositeExplicitAutograd")
_library.impl("expert_parts", _expert_parts, "CompositeExplicitAutograd")
_library.impl("experts", _experts_gpu, "CUDA")
_library.impl("expert_parts", _expert_parts_gpu, "CUDA")


@torch.library.register_fake(f"{NAMESPACE}::experts", lib=_library)
def _experts_fake(hidden: Tensor, *given: Any, **named: Any) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.register_fake(f"{NAMESPACE}::expert_parts", lib=_library)
def _expert_parts_fake(*given: Any, **named: Any) -> Tensor:
    mixture = _Mixture(*given, **named)
    return mixture.hidden.new_empty((*mixture.expert_ids.shape, mixture.hidden.shape[1]))


experts = torch.ops.halyard.experts.default
"""Sum over each token's chosen experts of weight * down(gated(gate_up(x))).

hidden [tokens, hidden_size]; gate_up [experts, 2 * width, hidden_size], gate rows first; down [experts,
hidden_size, width]; expert_ids and weights [tokens, top_k] -> [tokens, hidden_size]. `transposed`: both
are [experts, inputs, outputs]; `interleaved`: rows of gate and up take turns. Biases are [experts,
outputs]. Activations: see `gated`.
"""

expert_parts = torch.ops.halyard.expert_parts.default
"""As `experts`, but what each choice adds, [tokens, top_k, hidden_size]: for whom adds it up with more."""
