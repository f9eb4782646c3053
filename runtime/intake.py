"""Prompts and parameters become requests: everything a user can get wrong is found here. No torch."""

from __future__ import annotations

import itertools
import random
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

import numpy as np

from halyard.hal.errors import ContextLengthError, RequestError
from halyard.runtime.masks import Guidance
from halyard.runtime.request import (
    POOLINGS,
    Constraint,
    Pooling,
    Request,
    RequestOptions,
    SamplingParams,
)

__all__ = ["Grammars", "Intake", "Limits", "TokenIds"]

_NOTHING_SAMPLED = SamplingParams()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the memory allow."""

    vocab_size: int
    max_model_len: int  # prompt and answer together, in tokens
    eos_token_ids: frozenset[int]
    max_num_sequences: int  # most answers that can run at once, so n is at most that
    hidden_size: int = 0  # length of an embedding; 0: this engine makes none


class TokenIds(list[int]):
    """Plain ints, which JSON's parser made, and packed as for Request: they needn't be looked at again."""

    __slots__ = ("packed",)

    def __init__(self, ids: list[int], packed: bytes) -> None:
        super().__init__(ids)
        self.packed = packed

    @classmethod
    def of(cls, parsed: list[Any]) -> TokenIds | None:
        """What JSON's parser made of an array, if these are integers of 64 bits, without a loop.

        It must hold no bools and no numbers of numpy: they would pass for integers.
        """
        try:
            return cls(parsed, struct.pack(f"{len(parsed)}q", *parsed))
        except struct.error:
            return None


class Grammars(Protocol):
    """What is needed of runtime.guided.GrammarCompiler."""

    def guidance(self, constraint: Constraint) -> Guidance | None:
        """A constraint, compiled; None: that is done elsewhere."""


class Intake:
    """Validates and numbers requests. Safe to call from several threads."""

    def __init__(self, limits: Limits, seed: int = 0, grammars: Grammars | None = None) -> None:
        self.limits = limits
        self._grammars = grammars  # None: no tokenizer, so no structured output
        self._numbers = itertools.count()
        self._seeds = random.Random(seed)

    def request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Build a request; the answer is cut to what the context leaves.

        Raises:
            ContextLengthError: the prompt leaves no room for one token.
            RequestError: anything else, with the field to blame.
        """
        limits = self.limits
        prompt, packed = self.checked_prompt(prompt_token_ids, 1, "prompt")
        self._check_tokens(params.logit_bias or (), "logit_bias")
        self._check_tokens(params.stop_token_ids or (), "stop_token_ids")
        if params.n > limits.max_num_sequences:
            raise RequestError(
                f"n must be at most {limits.max_num_sequences} here, got {params.n}", "n"
            )
        room = limits.max_model_len - len(prompt)
        return Request(
            **self._numbered(options),
            prompt_token_ids=prompt,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            eos_token_ids=limits.eos_token_ids,
            arrival_time=time.monotonic(),
            seed=(params.seed if params.seed is not None else self._seeds.getrandbits(64)) % 2**64,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
            guidance=self.guidance(params),
            packed=packed,
        )

    def pooled_request(
        self,
        prompt_token_ids: Sequence[int],
        pooling: Pooling,
        **options: Unpack[RequestOptions],
    ) -> Request:
        """Build a request for an embedding: the prompt may fill the context.

        Raises:
            ContextLengthError: the prompt is longer than the context.
            RequestError: anything else, with the field to blame.
        """
        if not self.limits.hidden_size:
            raise RequestError("this model makes no embeddings", "model")
        if pooling not in POOLINGS:
            raise RequestError(
                f"pooling must be {' or '.join(POOLINGS)}, got {pooling!r}", "pooling"
            )
        prompt, packed = self.checked_prompt(prompt_token_ids, 0, "input")
        return Request(
            **self._numbered(options),
            prompt_token_ids=prompt,
            params=_NOTHING_SAMPLED,
            max_tokens=0,
            arrival_time=time.monotonic(),
            pooling=pooling,
            packed=packed,
        )

    def _numbered(self, options: RequestOptions) -> RequestOptions:
        """With an id, if they have none."""
        number = next(self._numbers)
        return {"request_id": f"request-{number}", **options}

    def checked_prompt(
        self, token_ids: Sequence[int], room: int, param: str
    ) -> tuple[tuple[int, ...], bytes]:
        """The prompt, and it packed as for Request, if it leaves `room` tokens of the context."""
        prompt, packed = _integers(token_ids, param)
        if not prompt:
            raise RequestError(f"the {param} is empty: give at least one token", param)
        largest = np.frombuffer(
            packed, np.uint64
        ).max()  # what is negative is larger than any other
        if largest >= self.limits.vocab_size:
            values = np.frombuffer(packed, np.int64)
            self._check_tokens((int(values.min()), int(values.max())), param)
        most = self.limits.max_model_len
        if len(prompt) + room > most:
            what = " for prompt and answer together" if room else ""
            raise ContextLengthError(  # in OpenAI's words: clients look for them
                f"this model's maximum context length is {most} tokens{what}, but the {param} has "
                f"{len(prompt)} tokens: shorten the {param}",
                param,
            )
        return prompt, packed

    def guidance(self, params: SamplingParams) -> Guidance | None:
        """The compiled constraint. Slow the first time (up to a second), so call it in a thread.

        Raises:
            RequestError: the constraint is malformed, impossible or too complex.
        """
        if params.guided is None:
            return None
        if self._grammars is None:
            param = params.guided.param
            raise RequestError(f"{param} is not supported: this model has no tokenizer", param)
        return self._grammars.guidance(params.guided)

    def _check_tokens(self, token_ids: Iterable[int], param: str) -> None:
        for token in token_ids:
            if not 0 <= token < self.limits.vocab_size:
                raise RequestError(
                    f"token id {token} in {param} is outside the vocabulary "
                    f"(0 to {self.limits.vocab_size - 1})",
                    param,
                )


def _integers(token_ids: Sequence[int], param: str) -> tuple[tuple[int, ...], bytes]:
    """Token ids twice, packed too. Prompts are long and the device may be waiting for them: no loop."""
    if isinstance(token_ids, TokenIds):
        return tuple(token_ids), token_ids.packed
    ids = token_ids if isinstance(token_ids, list) else list(token_ids)
    try:
        packed = struct.pack(f"{len(ids)}q", *ids)
    except struct.error:
        if all(isinstance(token, int) for token in ids):
            text = f"a token id in {param} is outside the vocabulary"
            raise RequestError(text, param) from None
        raise RequestError(f"{param} token ids must be integers", param) from None
    values = np.frombuffer(packed, np.int64)
    # A bool became 0 or 1; only where there are such is it worth looking.
    if ids and values.min() <= 1 and bool in map(type, ids):
        raise RequestError(f"{param} token ids must be integers", param)
    # Plain ints are kept, not made anew: only they have a plain int for their sum. Numbers of numpy are
    # not added up, for a sum of small ones overflows.
    plain = bool(ids) and type(ids[0]) is int and type(sum(ids)) is int
    return tuple(ids if plain else values.tolist()), packed
