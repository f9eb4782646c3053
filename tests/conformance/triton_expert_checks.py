"""Checks of what a mixture of experts takes on a GPU: its products, and a router's choice.

Not collected by itself, like triton_checks.py.
"""

from __future__ import annotations

from typing import Any

import torch

from halyard.hal.dtypes import torch_dtype


def experts(made: Any) -> None:
    """A mixture of experts against fp64: every gate, popular and unused experts, odd sizes, any layout."""
    from halyard.hal.kernels.experts import gated
    from halyard.hal.kernels.triton.experts import ProductTile, expert_parts

    where, dtype = made.device.torch_device, torch_dtype(made.dtype)
    most = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(where)

    def check(
        tokens: int, choices: int, count: int, size: int, width: int, tile: ProductTile,
        activation: str = "silu", limit: float = 0.0, biased: bool = False, transposed: bool = False,
        interleaved: bool = False,
    ) -> None:  # fmt: skip
        # The last expert is nobody's, the first nearly everybody's.
        scores = torch.rand(tokens, count, generator=generator)
        scores[:, 0] += 0.7
        scores[:, -1] -= 2.0
        ids = scores.topk(choices).indices.to(where)
        weights = torch.rand(tokens, choices, generator=generator).to(where)
        hidden = random(tokens, size + 8)[:, :size]  # rows further apart than they are long
        first, second = random(count, 2 * width, size), random(count, size, width)
        biases = (random(count, 2 * width), random(count, size)) if biased else (None, None)
        truth = torch.zeros(tokens, size, dtype=torch.float64, device=where)
        for token in range(tokens):
            for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
                both = first[expert].double() @ hidden[token].double()
                both = both if biases[0] is None else both + biases[0][expert].double()
                inner = gated(both, activation, interleaved, 1.7, limit)
                out = second[expert].double() @ inner
                truth[token] += weight * (
                    out if biases[1] is None else out + biases[1][expert].double()
                )
        if transposed:
            first, second = (w.transpose(1, 2).contiguous() for w in (first, second))
        given = (
            hidden,
            first,
            second,
            ids,
            weights,
            activation,
            *biases,
            transposed,
            interleaved,
            1.7,
            limit,
        )
        found = expert_parts(*given, tile).sum(1)
        error = (found.double() - truth).abs().max() / truth.abs().max()
        assert found.dtype == dtype
        assert found.shape == hidden.shape
        assert error <= most, (tokens, choices, count, activation, float(error))
        again = expert_parts(*given, tile).sum(1)
        assert torch.equal(again, found)

    small, large = ProductTile(16, 32, 16, 4, 2, 2), ProductTile(32, 64, 32, 4, 2, 8)
    check(1, 2, 4, 48, 40, small)
    check(1, 1, 3, 40, 24, large, "relu")
    check(37, 3, 6, 72, 40, small, "gelu")
    check(70, 2, 5, 64, 64, large, "gelu_tanh")
    check(70, 4, 9, 40, 24, small, biased=True, transposed=True)
    check(33, 4, 8, 48, 40, large, "swigluoai", 3.0, biased=True, transposed=True, interleaved=True)
    check(5, 2, 4, 48, 40, small, "swigluoai", interleaved=True)
    check(9, 2, 4, 48, 40, large, "silu", 2.0)


def largest(made: Any) -> None:
    """The largest of few columns as torch orders them; the first of equals; never a place outside."""
    from halyard.hal.kernels.triton.largest import largest_of_rows

    where, dtype = made.device.torch_device, torch_dtype(made.dtype)
    generator = torch.Generator().manual_seed(13)
    for rows, columns, k in (
        (0, 8, 2),
        (1, 128, 8),
        (37, 60, 6),
        (9, 5, 5),
        (3, 512, 16),
        (5, 1, 1),
    ):
        # All different, in 16 bits too, beside more columns that are others'.
        order = [torch.randperm(columns, generator=generator) for _ in range(rows)]
        x = torch.full((rows, columns + 3), 9e3, dtype=dtype, device=where)[:, :columns]
        if rows:
            x.copy_(torch.stack(order) - columns / 2)
        values, places = largest_of_rows(x, k)
        expected = x.topk(k, dim=-1)
        assert torch.equal(values, expected.values)
        assert torch.equal(places, expected.indices)
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]], dtype=dtype, device=where)
    assert largest_of_rows(x, 4)[1].tolist() == [[1, 2, 4, 3]]
    nothing, unknown = float("-inf"), float("nan")
    x = torch.tensor(
        [[nothing] * 3, [unknown] * 3, [unknown, 1.0, nothing]], dtype=dtype, device=where
    )
    values, places = largest_of_rows(x, 3)
    assert places.tolist() == [[0, 1, 2], [0, 1, 2], [1, 0, 2]]
    torch.testing.assert_close(values, x.gather(1, places), equal_nan=True)
