"""The operator of mixtures of experts: alone, and with the threads that torch has given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

import halyard.hal.kernels.experts  # noqa: F401 - registers the operator
from halyard.hal.kernels.native import library

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
