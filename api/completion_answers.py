"""Deltas become text completions: whole ones and streamed ones, with the prompt echoed on demand."""

from collections.abc import AsyncIterator, Sequence

from msgspec import UNSET, UnsetType

from halyard.api.deps import now
from halyard.api.generation import Generation
from halyard.api.schemas.common import CompletionUsage
from halyard.api.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionRequest,
)
from halyard.api.sse import DONE, TextEvents, event
from halyard.api.tokens import LegacyLogprobs, TokenWriter
from halyard.models.tokenizer import Tokenizer
from halyard.runtime.outputs import CompletionDelta
from halyard.runtime.plan import TokenLogprob

__all__ = ["CompletionAnswers"]

PromptLogprobs = Sequence[TokenLogprob | None]


class CompletionAnswers:
    """Writes one request's answers."""

    def __init__(
        self,
        generation: Generation,
        request: CompletionRequest,
        model: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._generation = generation
        self._request = request
        self._model = model
        self._tokenizer = tokenizer
        self._writer = TokenWriter(tokenizer, bool(request.return_tokens_as_token_ids))
        self._created = now()
        self._answers = [
            [self._answer(number, index) for index in range(generation.params.n)]
            for number in range(len(generation.prompts))
        ]

    async def whole(self) -> Completion:
        answers = self._answers
        async for number, delta in self._generation.deltas():
            for answer in answers[number]:
                answer.see_prompt(delta.prompt_logprobs)
            for new in delta.completions:
                answers[number][new.index].add(new)
        return Completion(
            id=self._generation.answer_id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._generation.fingerprint,
            choices=[answer.take() for own in answers for answer in self._best(own)],
            usage=self._generation.usage(),
        )

    async def events(self) -> AsyncIterator[bytes]:
        """Text as it comes, one choice a chunk, usage if asked for, and [DONE]."""
        options = self._request.stream_options
        wants_usage = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        plain = self._plain_events(None if wants_usage else UNSET)
        end = b""
        async for number, delta in self._generation.deltas():
            if plain is not None and not delta.finished and not self._answers[0][0].waits:
                if text := delta.completions[0].text:
                    yield plain(text)
                continue
            for answer in self._answers[number]:
                answer.see_prompt(delta.prompt_logprobs)
            choices = []
            for new in delta.completions:
                answer = self._answers[number][new.index]
                answer.add(new)
                if answer.has_news:
                    choices.append(answer.take())
            if choices:
                usage = self._generation.usage() if always else (None if wants_usage else UNSET)
                told = b"".join(event(self._chunk([choice], usage)) for choice in choices)
                if delta.finished and len(self._answers) == 1:
                    end = told  # nothing comes after it: it goes with what ends the stream
                else:
                    yield told
        if wants_usage:
            end += event(self._chunk([], self._generation.usage()))
        yield end + DONE

    def _plain_events(self, usage: UnsetType | None) -> TextEvents | None:
        """How events of a lone answer are written of which nothing but text is wanted."""
        asked, params = self._request, self._generation.params
        options = asked.stream_options
        if (
            len(self._answers) != 1
            or params.n != 1
            or params.logprobs is not None
            or params.prompt_logprobs is not None
            or asked.return_token_ids
            or self._generation.drop_answer
            or (options is not None and options.continuous_usage_stats)
        ):
            return None
        return TextEvents(self._chunk([CompletionChoice(0, "", None)], usage), "text")

    def _best(self, answers: "list[_Answer]") -> "list[_Answer]":
        """The n most likely of best_of answers, renumbered."""
        n = self._request.n or 1
        if len(answers) <= n:
            return answers
        best = sorted(answers, key=lambda answer: answer.score, reverse=True)[:n]
        for place, answer in enumerate(best):
            answer.index = answers[0].index // len(answers) * n + place
        return best

    def _chunk(
        self, choices: list[CompletionChoice], usage: CompletionUsage | UnsetType | None
    ) -> CompletionChunk:
        return CompletionChunk(
            id=self._generation.answer_id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._generation.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _answer(self, number: int, index: int) -> "_Answer":
        generation, request = self._generation, self._request
        prompt = generation.prompts[number]
        echo = ""
        if request.echo:
            given = request.prompt if isinstance(request.prompt, str) else request.prompt[number]
            if isinstance(given, str) and request.truncate_prompt_tokens is None:
                echo = given
            elif self._tokenizer is not None:
                echo = self._tokenizer.decode(prompt, skip_special_tokens=False)
        return _Answer(
            number * generation.params.n + index,
            prompt,
            echo,
            request,
            self._writer,
            generation.drop_answer,
        )


class _Answer:
    """One answer; what was added and not yet taken."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        echo: str,
        request: CompletionRequest,
        writer: TokenWriter,
        drop: bool,
    ) -> None:
        self.index = index
        self._prompt = prompt
        self._request = request
        self._writer = writer
        self._drop = drop
        self._legacy = LegacyLogprobs(writer)
        self._first = True
        self._logprob_sum = 0.0
        self._num_scored = 0
        self._prompt_logprobs: PromptLogprobs | None = None
        self._echo = echo
        self._text = echo
        self._token_ids: list[int] = []
        self._logprobs: CompletionLogprobs | None = None
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    @property
    def score(self) -> float:
        """Mean log-probability of its tokens."""
        return self._logprob_sum / max(1, self._num_scored)

    @property
    def has_news(self) -> bool:
        return bool(self._text or self._finish_reason or self._logprobs
                    or (self._request.return_token_ids and self._token_ids))  # fmt: skip

    @property
    def waits(self) -> bool:
        """Whether there is text to take: an echo, until the first token comes."""
        return bool(self._text)

    def see_prompt(self, logprobs: PromptLogprobs | None) -> None:
        """Prompt logprobs come once, before or with the first answer token."""
        if logprobs is None:
            return
        self._prompt_logprobs = logprobs
        if self._request.echo and self._request.logprobs is not None:
            self._logprobs = self._legacy.prompt(self._prompt, logprobs)

    def add(self, new: CompletionDelta) -> None:
        if new.finish_reason is not None:
            self._finish_reason = "length" if self._drop else new.finish_reason
            self._stop_reason = None if self._drop else new.stop_reason
        if self._drop:
            return
        self._text += new.text
        self._token_ids.extend(new.token_ids)
        for token in new.logprobs or ():
            self._logprob_sum += token.logprob
            self._num_scored += 1
        if new.logprobs and self._request.logprobs is not None:
            told = self._legacy.answer(new.logprobs)
            self._logprobs = (
                told if self._logprobs is None else LegacyLogprobs.join(self._logprobs, told)
            )

    def take(self) -> CompletionChoice:
        """What was added since the last call."""
        first, self._first = self._first, False
        wants_ids = bool(self._request.return_token_ids)
        own_prompt_logprobs = self._request.prompt_logprobs is not None and first
        choice = CompletionChoice(
            index=self.index,
            text=self._text,
            finish_reason=self._finish_reason,
            logprobs=self._logprobs,
            stop_reason=self._stop_reason,
            token_ids=self._token_ids if wants_ids else UNSET,
            prompt_token_ids=self._prompt if wants_ids and first else UNSET,
            prompt_logprobs=self._writer.distributions(self._prompt_logprobs)
            if own_prompt_logprobs and self._prompt_logprobs is not None
            else UNSET,
        )
        self._text, self._token_ids, self._logprobs = "", [], None
        return choice
