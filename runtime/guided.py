"""Answers held to a grammar, compiled with the checkpoint's tokenizer. No torch.

A constraint compiles once to a matcher that is copied for each answer; masks.py has the rest.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from halyard.hal.errors import RequestError
from halyard.runtime.closing import Closer
from halyard.runtime.masks import Allocate, Guidance, MaskMaker

if TYPE_CHECKING:
    from halyard.runtime.request import Constraint

__all__ = ["GrammarCompiler", "Vocabulary"]

_CACHED = 64  # compiled constraints kept
_MAX_TEXT = 128 << 10  # characters of a constraint
_MAX_PATTERN = 16 << 10  # characters of a regular expression or grammar
_MAX_SCHEMA_NODES = 4000  # values in a schema: its compile time grows with their square
# Between JSON's tokens: none, a space, or a line break and its indent. Unbounded white space is
# where small models get lost.
_WHITE_SPACE = r"[ ]|\n[ ]{0,24}"
# Bounds that keep a hostile constraint below a second and 200 MB.
_LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Characters of a time: its fraction of a second has no bound, and small models write hundreds of digits.
_LONGEST = {"time": 24, "date-time": 35}
_DATA = frozenset({"const", "enum", "default", "examples"})  # hold values of a schema, no schemas
_TRIED_STEPS = 3


class Vocabulary(Protocol):
    """What is needed of models.tokenizer.Tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def serialised(self) -> str | None: ...
    @property
    def special_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class GrammarCompiler:
    """Compiles constraints for one model. May be called from several threads."""

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        vocab_size: int,
        eos_token_ids: frozenset[int],
        allocate: Allocate | None = None,
    ) -> None:
        self.vocab_size = vocab_size  # of the logits; the tokenizer's may be smaller
        self._vocabulary = vocabulary  # called once, when the first constraint is compiled
        self._eos = sorted(token for token in eos_token_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._trie: Any = None  # llguidance's view of the vocabulary: built when first needed
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()
        closer = Closer(vocabulary, vocab_size, self._eos)
        self._maker = MaskMaker(vocab_size, self._eos, closer, allocate)

    def guidance(self, constraint: Constraint) -> Guidance:
        """A constraint, ready for one request.

        Raises:
            RequestError: it is malformed, impossible or too complex; the text says where.
        """
        with self._lock:
            matcher = self._compiled.pop(constraint, None)
            if matcher is None:
                matcher = self._compile(constraint)
            self._compiled[constraint] = matcher
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        return Guidance(self._maker, matcher)

    def _compile(self, constraint: Constraint) -> Any:
        param = constraint.param
        try:
            library: Any = importlib.import_module("llguidance")
        except ImportError:
            raise RequestError(
                f"{param} needs llguidance on the server: pip install llguidance", param
            ) from None
        if not self._eos:
            raise RequestError(
                f"{param} is not supported: the model knows no end-of-sequence token", param
            )
        _check_size(constraint)
        if self._trie is None:
            self._trie = self._build_trie(library)
        try:
            matcher = library.LLMatcher(
                self._trie,
                _grammar(library, constraint),
                log_level=0,
                limits=library.LLParserLimits(**_LIMITS),
            )
        except (ValueError, RecursionError) as error:
            raise _refusal(constraint, str(error)) from None
        if not matcher.is_error():
            self._try(constraint, matcher.deep_copy())
        if matcher.is_error():
            raise _refusal(constraint, matcher.get_error())
        return matcher

    def _try(self, constraint: Constraint, matcher: Any) -> None:
        """Take a few steps: what is impossible or explodes should be refused before it runs."""
        for step in range(_TRIED_STEPS):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if matcher.is_error():
                raise _refusal(constraint, matcher.get_error())
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            if not len(allowed) and step == 0:
                raise _refusal(constraint, "no text satisfies it")
            going_on = [token for token in allowed[:8].tolist() if token not in self._eos]
            if not going_on or not matcher.consume_token(going_on[0]):
                return

    def _build_trie(self, library: Any) -> Any:
        tokenizer = self._vocabulary()
        serialised = tokenizer.serialised
        if serialised is not None and tokenizer.vocab_size <= self.vocab_size:
            return library.LLTokenizer(serialised, n_vocab=self.vocab_size, eos_token=self._eos)
        wrapper = library.TokenizerWrapper(_PlainVocabulary(tokenizer, self.vocab_size, self._eos))
        return library.LLTokenizer(wrapper, n_vocab=self.vocab_size, eos_token=self._eos)


class _PlainVocabulary:
    """A tokenizer of another library, in the shape that llguidance asks for."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int, eos: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(
            token for token in {*tokenizer.special_ids, *eos} if token < vocab_size
        )
        special = set(self.special_token_ids)
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [
            tokenizer.token_bytes(token) if token not in special else b"<|special|>"
            for token in range(known)
        ] + [b""] * (vocab_size - known)

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text is wanted, not bytes")
        return self._tokenizer.encode(text, add_special_tokens=False)


def _check_size(constraint: Constraint) -> None:
    text, param = constraint.text, constraint.param
    most = _MAX_PATTERN if constraint.kind in ("regex", "grammar") else _MAX_TEXT
    if len(text) > most:
        raise RequestError(f"{param} has {len(text)} characters: at most {most} are taken", param)
    if constraint.kind == "json_schema":
        nodes, left = 0, [json.loads(text)]
        while left:
            value = left.pop()
            nodes += 1
            if isinstance(value, dict):
                left += value.values()
            elif isinstance(value, list):
                left += value
        if nodes > _MAX_SCHEMA_NODES:
            raise RequestError(
                f"{param} has {nodes} values: at most {_MAX_SCHEMA_NODES} are taken", param
            )


def _grammar(library: Any, constraint: Constraint) -> str:
    """llguidance's form of a constraint.

    Raises:
        ValueError: it is malformed.
    """
    text = constraint.text
    match constraint.kind:
        case "json_schema":
            options = {"whitespace_pattern": _WHITE_SPACE}
            schema = json.dumps(_bounded(json.loads(text)))
            found = library.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        case "regex":
            found = library.LLMatcher.grammar_from_regex(text)
        case "lark":
            found = library.LLMatcher.grammar_from_lark(text)
        case kind:
            found = library.grammar_from(kind, text)
    return str(found)


def _bounded(schema: Any) -> Any:
    """A schema whose times have a greatest length, where it says nothing about that."""
    if isinstance(schema, list):
        return [_bounded(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: value if key in _DATA else _bounded(value) for key, value in schema.items()}
    form = schema.get("format")
    if isinstance(form, str) and form in _LONGEST and not {"minLength", "maxLength"} & set(schema):
        made["maxLength"] = _LONGEST[form]
    return made


def _refusal(constraint: Constraint, reason: str) -> RequestError:
    told = " ".join(reason.replace("<non-verbose/>", "").split())
    if "NoExtension" in told:
        told = "no text satisfies it"
    return RequestError(f"{constraint.param} can't be used: {told[:300]}", constraint.param)
