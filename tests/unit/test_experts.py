"""The operator of mixtures of experts: alone, and with the threads that torch has given up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from halyard.hal.errors import ModelError
from halyard.hal.kernels.experts import expert_parts, gated
from halyard.hal.kernels.native import library
from halyard.models import experts

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 24, 256, 512, 6, 2


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / HIDDEN**0.5

    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K]
                       for _ in range(TOKENS)])  # fmt: skip
    gate_up = random(EXPERTS, 2 * WIDTH, HIDDEN)
    return (
        random(TOKENS, HIDDEN),
        gate_up,
        random(EXPERTS, HIDDEN, WIDTH),
        ids,
        random(TOKENS, TOP_K),
    )


def plain(*given: torch.Tensor) -> torch.Tensor:
    """Token by token."""
    hidden, gate_up, down, ids, weights = given
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
            out[token] += weight * (down[expert] @ (F.silu(gate) * up))
    return out


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(library, "_taken", 3)
    yield
    torch.set_num_threads(before)


def run(*given: torch.Tensor) -> torch.Tensor:
    return torch.ops.halyard.experts(*given, "silu")


def test_threads_share_experts_and_change_nothing(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs()
    with torch.inference_mode():
        shared = run(*given)
    names = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("halyard-experts") for name in names)
    torch.testing.assert_close(shared, plain(*given), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(library, "_taken", None)
    assert torch.equal(run(*given), shared)


def test_an_error_in_another_thread_is_the_callers(three_threads: None) -> None:
    hidden, gate_up, down, ids, weights = inputs()
    with pytest.raises(RuntimeError):
        run(hidden, gate_up, down[..., :-1], ids, weights)
    torch.testing.assert_close(run(hidden, gate_up, down, ids, weights),
                               plain(hidden, gate_up, down, ids, weights), atol=1e-5, rtol=1e-5)  # fmt: skip


def test_parts_are_what_is_added_up() -> None:
    given = inputs()
    parts = expert_parts(*given, "silu")
    assert parts.shape == (TOKENS, TOP_K, HIDDEN)
    torch.testing.assert_close(parts.sum(1), plain(*given), atol=1e-5, rtol=1e-5)


class Usual:
    """As transformers' experts: what becomes of gate and up is a method."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor] = F.silu, **more: Any) -> None:
        self.act_fn = act
        self.__dict__ |= more

    def _default_apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return self.act_fn(gate) * up

    _apply_gate = _default_apply_gate


class Clamped(Usual):
    """A limit that no usual number reaches."""

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


class Oss(Usual):
    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        return gated(both, "swigluoai", True, 1.702, 7.0)


class Late(Usual):
    """Held below its limit when it is activated: none of ours."""

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Usual(), ("silu", False, 1.0, 0.0)),
        (Usual(F.gelu, limit=None), ("gelu", False, 1.0, 0.0)),
        (Usual(lambda x: F.gelu(x, approximate="tanh")), ("gelu_tanh", False, 1.0, 0.0)),
        (Usual(F.relu, alpha=1.7), ("relu", False, 1.0, 0.0)),
        (Clamped(swiglu_limit=10.0), ("silu", False, 1.0, 10.0)),
        (Oss(alpha=1.702, limit=7.0), ("swigluoai", True, 1.702, 7.0)),
        (Oss(swiglu_alpha=1.702, swiglu_limit=7.0), ("swigluoai", True, 1.702, 7.0)),
        (Clamped(), None),  # nobody says what the limit is
        (Late(limit=7.0), None),
    ],
)
def test_a_gate_is_known_by_its_values(module: Usual, found: tuple[Any, ...] | None) -> None:
    gate = experts._gate_of(module)
    assert (
        None if gate is None else (gate.activation, gate.interleaved, gate.alpha, gate.limit)
    ) == found


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ModelError, match="activation"):
        experts._gate_of(Usual(torch.tanh))
