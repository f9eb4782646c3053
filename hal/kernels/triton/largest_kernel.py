"""The largest of few columns: what a router chooses experts by."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest_kernel"]


@triton.jit(do_not_specialize=["num_rows"])
def largest_kernel(
    x: tl.tensor, out: tl.tensor, places: tl.tensor, num_rows: tl.tensor, x_row: tl.tensor,
    COLUMNS: tl.constexpr, PAD: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """x [num_rows, COLUMNS] -> its MOST largest, in order, in out and their places int64 [num_rows, MOST].

    Of equal ones the first come first. NaN counts as the least: a place is one of the columns whatever
    x holds. PAD: a power of two from COLUMNS on. Grid: ROWS rows each.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PAD)[None, :]
    there = row < num_rows
    source = x + row.to(tl.int64) * x_row
    score = tl.load(source[:, None] + column, mask=there[:, None] & (column < COLUMNS), other=0.0)
    score = score.to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    taken = tl.zeros([ROWS, PAD], tl.int32) + (column >= COLUMNS)
    for number in tl.static_range(MOST):
        most = tl.max(tl.where(taken == 0, score, float("-inf")), 1)
        hit = (score == most[:, None]) & (taken == 0)
        place = tl.min(tl.where(hit, column, PAD), 1)
        taken = tl.where(column == place[:, None], 1, taken)
        target = row.to(tl.int64) * MOST + number
        tl.store(places + target, place.to(tl.int64), mask=there)
        tl.store(out + target, tl.load(source + place, mask=there), mask=there)
