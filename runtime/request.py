"""What a user asks for: sampling parameters and requests. No torch here."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from halyard.hal.errors import RequestError

if TYPE_CHECKING:
    from halyard.runtime.masks import Guidance

__all__ = [
    "MAX_LOGPROBS",
    "POOLINGS",
    "Constraint",
    "Pooling",
    "Request",
    "RequestOptions",
    "SamplingParams",
]

Pooling = Literal["last", "mean"]
"""What becomes of a prompt's final hidden states: that of the last token, or the mean of all."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

MAX_LOGPROBS = 20  # most alternatives a token can report, as in OpenAI's API


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like. Made by the class methods; compiled with the tokenizer later.

    Equal constraints are compiled once. `param` is the user's field that errors name.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "lark"]
    text: str  # a schema as JSON, a pattern, a JSON list, a Lark or GBNF grammar
    param: str = field(default="guided", compare=False)

    @classmethod
    def json_schema(
        cls, schema: str | bool | Mapping[str, Any], param: str = "guided"
    ) -> Constraint:
        """JSON that satisfies a schema.

        Raises:
            RequestError: it is no JSON object, or nested too deeply.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            parsed = {} if parsed is True else parsed
            if not isinstance(parsed, Mapping):
                raise RequestError(f"{param} must be a JSON schema: a JSON object", param)
            return cls("json_schema", json.dumps(parsed), param)
        except RecursionError:
            raise RequestError(f"{param} is nested too deeply", param) from None
        except (TypeError, ValueError) as error:
            raise RequestError(f"{param} is not valid JSON: {error}", param) from None

    @classmethod
    def json_object(cls, param: str = "guided") -> Constraint:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}', param)

    @classmethod
    def regex(cls, pattern: str, param: str = "guided") -> Constraint:
        """Text that a regular expression matches as a whole."""
        return cls("regex", pattern, param)

    @classmethod
    def choice(cls, options: Sequence[str], param: str = "guided") -> Constraint:
        """One of several texts.

        Raises:
            RequestError: there is none, or one is empty or no text.
        """
        if not options or not all(isinstance(one, str) and one for one in options):
            raise RequestError(f"{param} must be a list of texts, at least one, none empty", param)
        return cls("choice", json.dumps(list(options)), param)

    @classmethod
    def grammar(cls, text: str, param: str = "guided") -> Constraint:
        """Text of a context-free grammar, in Lark's or llama.cpp's (GBNF) notation."""
        return cls("grammar", text, param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names and defaults are vLLM's.

    Raises:
        RequestError: a value is out of range; the text and `param` name it.
    """

    n: int = 1  # answers per prompt; they share the prompt's KV blocks
    presence_penalty: float = 0.0  # -2..2, subtracted once from logits of tokens already answered
    frequency_penalty: float = 0.0  # -2..2, subtracted per occurrence in the answer
    repetition_penalty: float = (
        1.0  # > 0; divides (multiplies) positive (negative) logits of seen tokens
    )
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 0..1; 0: the most likely token alone
    top_k: int = 0  # 0 or -1: all
    min_p: float = 0.0  # 0..1, relative to the most likely token
    seed: int | None = None  # same seed, same request -> same tokens, whatever else is in the batch
    stop: str | Sequence[str] | None = None  # strings that end the answer; not part of it
    stop_token_ids: Sequence[int] | None = None  # tokens that end the answer
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the context's end
    min_tokens: int = 0  # nothing ends the answer before that many
    logprobs: int | None = None  # alternatives per answer token, 0 for the chosen token alone
    prompt_logprobs: int | None = None  # the same for prompt tokens
    logit_bias: Mapping[int, float] | None = None  # token id -> -100..100, added to its logit
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    guided: Constraint | None = None  # what the answer must look like
    guided_finish: bool = False  # led to the form's end before max_tokens, instead of cut off there

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{param} must be {rule}, got {getattr(self, param)}", param)

        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            check(math.isfinite(getattr(self, name)), name, "a finite number")
        check(self.n >= 1, "n", "at least 1")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        check(self.repetition_penalty > 0, "repetition_penalty", "greater than 0")
        check(self.temperature >= 0, "temperature", "0 (greedy) or greater")
        check(0 <= self.top_p <= 1, "top_p", "between 0 and 1")
        check(self.top_k >= -1, "top_k", "-1 or 0 (all) or greater")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "0 or greater")
        if self.max_tokens is not None:
            check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"at most max_tokens ({self.max_tokens})",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(
                value is None or 0 <= value <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}"
            )
        if self.seed is not None:
            check(-(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        if self.logit_bias is not None:
            check(
                all(-100 <= bias <= 100 for bias in self.logit_bias.values()),
                "logit_bias",
                "between -100 and 100 for each token",
            )
        check(all(self.stop_strings), "stop", "without empty strings")

    def __getstate__(self) -> list[Any]:
        """For pickle: what dataclasses do, in a third of the time."""
        return list(_sampling_values(self))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_sampling_values: Callable[[SamplingParams], tuple[Any, ...]] = attrgetter(
    *(one.name for one in fields(SamplingParams))
)


class RequestOptions(TypedDict, total=False):
    """What may be said of a request beside prompt and parameters: see the fields of Request."""

    request_id: str  # default: a number of the engine's
    priority: int
    cache_salt: str
    tenant: str
    share: float


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way through the engine. Immutable; sequences hold what changes."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # at least one
    params: SamplingParams
    max_tokens: int  # resolved: prompt + answer fit in the context
    eos_token_ids: frozenset[int] = frozenset()  # empty when unknown
    priority: int = 0  # lower runs first
    arrival_time: float = 0.0  # seconds, time.monotonic()
    cache_salt: str = ""  # prefix blocks are shared only among equal salts
    tenant: str = "default"  # whose request it is: for fair shares, limits and usage
    share: float = 1.0  # of the tenant's service when tenants compete, against others' shares
    seed: int = 0  # resolved: params.seed or one drawn by the engine
    stop_token_ids: frozenset[int] = field(
        default_factory=frozenset
    )  # params.stop_token_ids as a set
    guidance: Guidance | None = field(default=None, compare=False, repr=False)
    # ^ params.guided, compiled; holds how far each answer is
    pooling: Pooling | None = None  # an embedding is wanted, no answer: max_tokens is 0 then
    packed: bytes = field(default=b"", compare=False, repr=False)
    # ^ the prompt as int64, in the machine's order of bytes; b"": not at hand

    @property
    def reuses_prefix(self) -> bool:
        """May blocks of the prefix cache stand in for computing its tokens?"""
        return self.params.prompt_logprobs is None and self.pooling != "mean"

    def __reduce__(self) -> tuple[Callable[[list[Any]], Request], tuple[list[Any]]]:
        """A prompt goes once, packed: a number at a time takes longest. Not `__getstate__`, which
        dataclasses of Python before 3.11.4 write over.
        """
        values = list(_request_values(self))
        if self.packed:
            values[_PROMPT] = None
        return _request_of, (values,)


def _request_of(values: list[Any]) -> Request:
    if values[_PROMPT] is None:
        packed: bytes = values[_PACKED]
        values[_PROMPT] = struct.unpack(f"{len(packed) // 8}q", packed)
    return Request(*values)


_REQUEST_FIELDS = tuple(one.name for one in fields(Request))
_PROMPT, _PACKED = map(_REQUEST_FIELDS.index, ("prompt_token_ids", "packed"))
_request_values: Callable[[Request], tuple[Any, ...]] = attrgetter(*_REQUEST_FIELDS)
