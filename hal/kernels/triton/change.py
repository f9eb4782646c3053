"""Changes logits before tokens are drawn: penalties for what was said, and what a grammar forbids."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["CHUNK", "change_kernel"]

CHUNK = 4096  # tokens of a program


@triton.jit(
    do_not_specialize=["num", "words"],
    do_not_specialize_on_alignment=[
        "logits", "rows", "changed", "penalties", "slots", "seen", "answered", "masks", "allowed",
    ],
)  # fmt: skip
def change_kernel(
    logits: tl.tensor, rows: tl.tensor, changed: tl.tensor, penalties: tl.tensor, slots: tl.tensor,
    seen: tl.tensor, answered: tl.tensor, masks: tl.tensor, allowed: tl.tensor, vocab: tl.tensor,
    row_stride: tl.tensor, words: tl.tensor, num: tl.tensor, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """logits [any, vocab]; rows [num] int64; changed [num, vocab] fp32; penalties [3, num] fp32: repetition,
    frequency, presence; slots, masks [num] int64, -1: none; seen int8 and answered fp32 [slots, vocab];
    allowed [masks, words] int32. Grid: (num, chunks of SIZE).
    """
    number = tl.program_id(0)
    token = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = token < vocab
    row = logits + tl.load(rows + number) * row_stride
    logit = tl.load(row + token, mask=there, other=0.0).to(tl.float32)
    slot = tl.load(slots + number)
    if slot >= 0:
        repetition = tl.load(penalties + number)
        frequency = tl.load(penalties + num + number)
        presence = tl.load(penalties + 2 * num + number)
        first = slot * vocab
        was = tl.load(seen + first + token, mask=there, other=0) != 0
        times = tl.load(answered + first + token, mask=there, other=0.0)
        scaled = tl.where(logit > 0.0, tl.div_rn(logit, repetition), logit * repetition)
        logit = tl.where(was, scaled, logit)
        logit -= frequency * times
        logit -= tl.where(times > 0.0, presence, 0.0)
    mask = tl.load(masks + number)
    if mask >= 0:
        word = tl.load(allowed + mask * words + token // 32, mask=there, other=0)
        barred = ((word >> (token % 32)) & 1) == 0
        # What is no number stays none: the row is bad whatever its grammar forbids.
        logit = tl.where(barred & (logit == logit), float("-inf"), logit)
    tl.store(changed + number.to(tl.int64) * vocab + token, logit, mask=there)
