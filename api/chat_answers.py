"""Deltas become chat completions: whole ones and streamed ones."""

from collections.abc import AsyncIterator

from msgspec import UNSET, UnsetType

from halyard.api.answer_reader import AnswerReader, Piece, ReadingRules
from halyard.api.deps import now
from halyard.api.generation import Generation
from halyard.api.schemas.chat import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ToolCall,
    ToolCallDelta,
)
from halyard.api.schemas.common import CompletionUsage, TokenDistribution
from halyard.api.sse import DONE, TextEvents, event
from halyard.api.tokens import TokenWriter
from halyard.api.tool_reader import CallPiece
from halyard.runtime.outputs import CompletionDelta

__all__ = ["ChatAnswers"]


class ChatAnswers:
    """Writes one request's answers."""

    def __init__(
        self,
        generation: Generation,
        request: ChatCompletionRequest,
        model: str,
        writer: TokenWriter,
        rules: ReadingRules | None = None,
    ) -> None:
        self._generation = generation
        self._request = request
        self._rules = rules or ReadingRules()
        self._model = model
        self._writer = writer
        self._created = now()

    async def whole(self) -> ChatCompletion:
        generation, request = self._generation, self._request
        parts = [_Parts(AnswerReader(self._rules)) for _ in range(generation.params.n)]
        prompt_logprobs: list[dict[str, TokenDistribution] | None] | UnsetType = UNSET
        async for _, delta in generation.deltas():
            if delta.prompt_logprobs is not None:
                prompt_logprobs = self._writer.distributions(delta.prompt_logprobs)
            for new in delta.completions:
                parts[new.index].add(new, self._logprobs(new))
        return ChatCompletion(
            id=generation.answer_id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._generation.fingerprint,
            choices=[
                part.choice(index, bool(request.return_token_ids))
                for index, part in enumerate(parts)
            ],
            usage=generation.usage(),
            prompt_logprobs=prompt_logprobs,
            prompt_token_ids=generation.prompts[0] if request.return_token_ids else UNSET,
        )

    async def events(self) -> AsyncIterator[bytes]:
        """Role first, then text, then the finish reason, usage if asked for, and [DONE].

        One choice a chunk, as OpenAI's: many clients look at the first alone.
        """
        generation, request = self._generation, self._request
        options = request.stream_options
        wants_usage = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        started: set[int] = set()
        readers = [AnswerReader(self._rules) for _ in range(generation.params.n)]
        plain = None
        if (
            generation.params.n == 1
            and generation.params.logprobs is None
            and generation.params.prompt_logprobs is None
            and readers[0].takes_all
            and not (always or request.return_token_ids)
        ):
            choice = ChatChunkChoice(0, ChatDelta(content=""), None)
            plain = TextEvents(self._chunk([choice], None if wants_usage else UNSET), "content")
        end = b""
        async for _, delta in generation.deltas():
            if plain is not None and started and not delta.finished:
                if text := delta.completions[0].text:
                    yield plain(text)
                continue
            choices = []
            for new in delta.completions:
                first = new.index not in started
                started.add(new.index)
                reader = readers[new.index]
                piece = reader.push(new.text, new.finish_reason is not None)
                if not (first or piece or new.finish_reason or new.logprobs
                        or request.return_token_ids):  # fmt: skip
                    continue  # the text is held back until it is certain what it is
                choices.append(self._chunk_choice(new, first, piece, reader.has_calls))
            if choices:
                usage = generation.usage() if always else (None if wants_usage else UNSET)
                told = b"".join(event(self._chunk([choice], usage)) for choice in choices)
                if delta.finished:
                    end = told  # nothing comes after it: it goes with what ends the stream
                else:
                    yield told
        if wants_usage:
            end += event(self._chunk([], generation.usage()))
        yield end + DONE

    def _chunk_choice(
        self, new: CompletionDelta, first: bool, piece: Piece, has_calls: bool
    ) -> ChatChunkChoice:
        only_content = not (piece.thought or piece.calls)
        return ChatChunkChoice(
            index=new.index,
            delta=ChatDelta(
                role="assistant" if first else UNSET,
                content=piece.content if piece.content or (first and only_content) else UNSET,
                reasoning_content=piece.thought or UNSET,
                tool_calls=[_call_delta(call) for call in piece.calls] or UNSET,
            ),
            finish_reason=_reason(new.finish_reason, has_calls),
            logprobs=self._logprobs(new),
            stop_reason=UNSET if new.stop_reason is None else new.stop_reason,
            token_ids=list(new.token_ids) if self._request.return_token_ids else UNSET,
        )

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: CompletionUsage | UnsetType | None
    ) -> ChatChunk:
        return ChatChunk(
            id=self._generation.answer_id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._generation.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, new: CompletionDelta) -> ChatLogprobs | None:
        return None if new.logprobs is None else self._writer.chat(new.logprobs)


def _call_delta(call: CallPiece) -> ToolCallDelta:
    if call.call_id is None:
        return ToolCallDelta(call.index, CalledFunction(call.arguments))
    function = CalledFunction(call.arguments, call.name or "")
    return ToolCallDelta(call.index, function, call.call_id, "function")


def _reason(reason: str | None, has_calls: bool) -> str | None:
    """An answer that ends with calls says so."""
    return "tool_calls" if reason == "stop" and has_calls else reason


class _Parts:
    """One answer as it grows."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self._thoughts: list[str] = []
        self._texts: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, pieces of arguments
        self._token_ids: list[int] = []
        self._logprobs: ChatLogprobs | None = None
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    def add(self, new: CompletionDelta, logprobs: ChatLogprobs | None) -> None:
        piece = self._reader.push(new.text, new.finish_reason is not None)
        self._thoughts.append(piece.thought)
        self._texts.append(piece.content)
        for call in piece.calls:
            if call.call_id is not None:
                self._calls.append((call.call_id, call.name or "", []))
            self._calls[-1][2].append(call.arguments)
        self._token_ids.extend(new.token_ids)
        if logprobs is not None:
            if self._logprobs is None:
                self._logprobs = ChatLogprobs([])
            self._logprobs.content.extend(logprobs.content)
        if new.finish_reason is not None:
            self._finish_reason, self._stop_reason = new.finish_reason, new.stop_reason

    def choice(self, index: int, with_token_ids: bool) -> ChatChoice:
        content, thought = "".join(self._texts), "".join(self._thoughts)
        calls = [
            ToolCall(call_id, CalledFunction("".join(arguments), name))
            for call_id, name, arguments in self._calls
        ]
        return ChatChoice(
            index=index,
            message=ChatMessage(
                content if content or not (calls or thought) else None,
                reasoning_content=thought or UNSET,
                tool_calls=calls or UNSET,
            ),
            finish_reason=_reason(self._finish_reason, bool(calls)),
            logprobs=self._logprobs,
            stop_reason=self._stop_reason,
            token_ids=self._token_ids if with_token_ids else UNSET,
        )
