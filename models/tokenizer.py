"""The checkpoint's tokenizer behind a small interface. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from halyard.hal.errors import ModelError, RequestError
from halyard.models.byte_level import ByteDetokenizer, BytePieces, byte_level_alphabet
from halyard.models.detokenizer import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halyard.models.source import ModelSource

__all__ = ["Tokenizer", "has_tokenizer", "load_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """Text to ids and back, and chat templates. Safe to use from several threads."""

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self._inner = inner

    @property
    def vocab_size(self) -> int:
        return len(self._inner)

    @property
    def bos_token_id(self) -> int | None:
        bos: int | None = self._inner.bos_token_id
        return bos

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self._inner.eos_token_id
        return () if eos is None else (eos,)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._inner.chat_template)

    @property
    def chat_template(self) -> str:
        """Its source; where there are several, the one for tools. Empty: none."""
        template: Any = self._inner.chat_template or ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default") or ""
        return str(template)

    @property
    def serialised(self) -> str | None:
        """The tokenizers library's JSON; None where another library tokenises."""
        backend = getattr(self._inner, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text."""
        return frozenset(self._inner.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self._plain_backend is not None:  # a quarter of the wrapper's price
            return str(self._plain_backend.decode(token_ids, skip_special_tokens))
        text: Any = self._inner.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, special ones included; broken bytes as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, also of one that is part of a character."""
        piece: Any = self._inner.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if token_id not in self._special_ids and self._is_byte_level:
            table = byte_level_alphabet()
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return self.token_text(token_id).encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Render a conversation by the checkpoint's own template.

        Raises:
            RequestError: there is no template, or it refuses these messages.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template: use completions instead", "messages"
            )
        if not messages:
            raise RequestError("messages is empty: give at least one", "messages")
        try:
            text: Any = self._inner.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            reason = str(error).split("\n")[0]
            raise RequestError(
                f"the chat template refuses the messages: {reason}", "messages"
            ) from error
        return self.encode(text, add_special_tokens=False)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer | ByteDetokenizer:
        pieces = self._pieces(skip_special_tokens)
        if pieces is not None:
            return ByteDetokenizer(pieces)
        return Detokenizer(lambda ids: self.decode(ids, skip_special_tokens))

    def _pieces(self, skip_special_tokens: bool) -> BytePieces | None:
        """The bytes of every token; None where text is more than its tokens' bytes."""
        if skip_special_tokens in self._known_pieces:
            return self._known_pieces[skip_special_tokens]
        backend = self._plain_backend
        pieces = None
        if backend is not None and type(backend.decoder).__name__ == "ByteLevel":
            added = backend.get_added_tokens_decoder().values() if skip_special_tokens else ()
            special = frozenset(token.content for token in added if token.special)
            pieces = BytePieces(backend.id_to_token, special)
        self._known_pieces[skip_special_tokens] = pieces
        return pieces

    @cached_property
    def _known_pieces(self) -> dict[bool, BytePieces | None]:
        return {}

    @cached_property
    def _plain_backend(self) -> Any:
        """The tokenizers library's tokenizer, where decoding is its own and nothing else's."""
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        kind: Any = type(self._inner)
        if (
            getattr(kind, "_decode", None) is PreTrainedTokenizerFast._decode
            and kind.decode is PreTrainedTokenizerBase.decode
        ):
            return self._inner.backend_tokenizer
        return None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._inner.all_special_ids) | frozenset(self._inner.added_tokens_decoder)

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self._inner, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in backend.to_str()[-20_000_000:]


def has_tokenizer(source: ModelSource) -> bool:
    """Whether a checkpoint holds a tokenizer's files."""
    present = [name for name in _FILES if (source.path / name).is_file()]
    return bool(present) and present != ["tokenizer_config.json"]


def load_tokenizer(source: ModelSource) -> Tokenizer | None:
    """The tokenizer of a checkpoint, or None if it has none.

    Raises:
        ModelError: there is one, but it can't be read.
    """
    if not has_tokenizer(source):
        return None
    try:
        return Tokenizer(_load(source))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"can't read the tokenizer of {source.name}: {reason}") from error
    except Exception as error:  # the tokenizers library raises bare Exception for a corrupt file
        if type(error) is not Exception:
            raise
        raise ModelError(f"can't read the tokenizer of {source.name}: {error}") from error


def _load(source: ModelSource) -> PreTrainedTokenizerBase:
    folder = source.path
    settings: dict[str, Any] = {}
    config = folder / "tokenizer_config.json"
    if config.is_file():
        settings = json.loads(config.read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"{config.name} is no JSON object")
    plain = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    if (folder / "tokenizer.json").is_file() and plain:
        # Skips AutoTokenizer's look at every model's module: a second of start-up.
        from transformers import PreTrainedTokenizerFast

        fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
        return fast
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
