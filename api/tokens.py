"""How tokens and their probabilities are written on the wire."""

from collections.abc import Sequence

from halyard.api.schemas.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from halyard.api.schemas.common import TokenDistribution
from halyard.api.schemas.completions import CompletionLogprobs
from halyard.models.tokenizer import Tokenizer
from halyard.runtime.plan import TokenLogprob

__all__ = ["LegacyLogprobs", "TokenWriter"]

_LOWEST = -9999.0  # JSON has no minus infinity; OpenAI writes this


class TokenWriter:
    """Token ids as text, also where the checkpoint has no tokenizer.

    Args:
        as_ids: tokens are named `token_id:7`, as vLLM does on demand.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None
        self._names: dict[int, str] = {}

    def name(self, token_id: int) -> str:
        """The token's text, or `bytes:\\xe2` for a part of a character, so that names are unique."""
        known = self._names.get(token_id)
        if known is None:
            known = self._names[token_id] = self._name(token_id)
        return known

    def chat(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        """Chat's form."""
        return ChatLogprobs(
            [
                ChatTokenLogprob(
                    token=self.name(token.token_id),
                    logprob=_finite(token.logprob),
                    bytes=self._bytes(token.token_id),
                    top_logprobs=[
                        TopLogprob(self.name(token_id), _finite(logprob), self._bytes(token_id))
                        for token_id, logprob in token.top
                    ],
                )
                for token in logprobs
            ]
        )

    def distributions(
        self, logprobs: Sequence[TokenLogprob | None]
    ) -> list[dict[str, TokenDistribution] | None]:
        """vLLM's form of prompt_logprobs; the first token has none."""
        return [None if token is None else self._distribution(token) for token in logprobs]

    def _distribution(self, token: TokenLogprob) -> dict[str, TokenDistribution]:
        found = {
            str(token_id): TokenDistribution(_finite(logprob), rank, self.name(token_id))
            for rank, (token_id, logprob) in enumerate(token.top, start=1)
        }
        chosen = TokenDistribution(_finite(token.logprob), token.rank, self.name(token.token_id))
        found.setdefault(str(token.token_id), chosen)
        return found

    def _bytes(self, token_id: int) -> list[int] | None:
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))

    def _name(self, token_id: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class LegacyLogprobs:
    """Builds the parallel lists of text completions; offsets run on across chunks."""

    def __init__(self, writer: TokenWriter) -> None:
        self._writer = writer
        self._offset = 0

    def prompt(
        self, prompt: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> CompletionLogprobs:
        """Of an echoed prompt: the first token has no probability."""
        told = self._empty()
        for token_id, token in zip(prompt, logprobs, strict=True):
            self._add(told, token_id, token)
        return told

    def answer(self, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        told = self._empty()
        for token in logprobs:
            self._add(told, token.token_id, token)
        return told

    @staticmethod
    def join(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
        return CompletionLogprobs(
            first.tokens + second.tokens,
            first.token_logprobs + second.token_logprobs,
            first.top_logprobs + second.top_logprobs,
            first.text_offset + second.text_offset,
        )

    @staticmethod
    def _empty() -> CompletionLogprobs:
        return CompletionLogprobs([], [], [], [])

    def _add(self, told: CompletionLogprobs, token_id: int, token: TokenLogprob | None) -> None:
        name = self._writer.name(token_id)
        told.tokens.append(name)
        told.text_offset.append(self._offset)
        self._offset += len(name)
        if token is None:
            told.token_logprobs.append(None)
            told.top_logprobs.append(None)
            return
        told.token_logprobs.append(_finite(token.logprob))
        top = {self._writer.name(other): _finite(logprob) for other, logprob in token.top}
        top.setdefault(name, _finite(token.logprob))
        told.top_logprobs.append(top)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
