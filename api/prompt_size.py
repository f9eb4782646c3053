"""Texts that can't fit are refused before they are tokenised: reading megabytes costs seconds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from halyard.hal.errors import ContextLengthError, RequestError
from halyard.models.tokenizer import Tokenizer

__all__ = ["MAX_PROMPTS", "MAX_STOPS", "check_count", "check_texts"]

MAX_PROMPTS = 2048  # of one HTTP request
MAX_STOPS = 64  # stop strings: each is looked for at every token
_PLENTY = 16  # characters a token: texts below that are worth tokenising to say how long they are
_SLACK = 2  # for what a tokenizer's normalisation may drop


def check_count(count: int, most: int, what: str, param: str) -> None:
    """
    Raises:
        RequestError: there are too many.
    """
    if count > most:
        raise RequestError(f"at most {most} {what} are taken, got {count}", param)


def check_texts(
    texts: Iterable[str], tokenizer: Tokenizer | None, max_model_len: int, param: str
) -> None:
    """
    Raises:
        ContextLengthError: one is longer than the context, even if every token were the longest.
    """
    longest = max(map(len, texts), default=0)
    if tokenizer is None or longest <= _PLENTY * max_model_len:
        return
    if longest > _SLACK * max_model_len * _longest_token(tokenizer):
        raise ContextLengthError(
            f"the {param} has a text of {longest} characters, which can't fit in the context of "
            f"{max_model_len} tokens: shorten it",
            param,
        )


@lru_cache(maxsize=4)
def _longest_token(tokenizer: Tokenizer) -> int:
    return max(
        (len(tokenizer.token_text(token)) for token in range(tokenizer.vocab_size)), default=1
    )
