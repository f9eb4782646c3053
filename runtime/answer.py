"""Token events become text: detokenising, stop strings and the bookkeeping of n answers. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from halyard.runtime.outputs import CompletionDelta, RequestDelta
from halyard.runtime.plan import FinishReason, TokenEvent, TokenLogprob
from halyard.runtime.request import Request

__all__ = ["Answers", "IncrementalDecoder", "StopMatcher"]


class IncrementalDecoder(Protocol):
    """What Answers needs of models.detokenizer.Detokenizer."""

    def push(self, token_ids: tuple[int, ...]) -> str: ...

    def flush(self) -> str: ...


class Detokenizes(Protocol):
    """What Answers needs of models.tokenizer.Tokenizer."""

    def detokenizer(self, skip_special_tokens: bool = True) -> IncrementalDecoder: ...


class StopMatcher:
    """Finds stop strings in a growing text and holds back what may turn out to be one."""

    def __init__(self, stop_strings: tuple[str, ...], include: bool) -> None:
        self._stops = stop_strings
        self._include = include
        self._held = ""  # decoded, not yet released: a prefix of some stop string, or shorter
        self._early = 0  # so much of it is too early for a stop string to end in

    def push(self, text: str, *, early: bool = False) -> tuple[str, str | None]:
        """Add text; returns what can be released and the stop string that matched, if any.

        Args:
            early: no stop string that ends within this text counts; one may begin here.
        """
        if not self._stops:
            return text, None
        self._held += text
        if early:
            self._early = len(self._held)
        places = ((self._find(stop), stop) for stop in self._stops)
        found = [(at, stop) for at, stop in places if at >= 0]
        if found:
            at, stop = min(found)
            end = at + len(stop) if self._include else at
            released, self._held = self._held[:end], ""
            return released, stop
        keep = self._possible_start()
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        self._early = max(0, self._early - cut)
        return released, None

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._early - len(stop) + 1))

    def flush(self) -> str:
        """The answer ended otherwise: what was held back is text after all."""
        released, self._held = self._held, ""
        return released

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


@dataclass(slots=True)
class _Answer:
    decoder: IncrementalDecoder | None
    stops: StopMatcher
    num_tokens: int = 0
    finished: bool = False


@dataclass(slots=True)
class _New:
    """What one answer gained from a batch of events."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


class Answers:
    """The n answers of one request as its client sees them.

    Feed it the request's events in order; it returns deltas whose text is final. `abandoned` names
    answers that ended here by a stop string while the engine still goes on with them: the owner
    must abort these.
    """

    def __init__(self, request: Request, decoder: Callable[[], IncrementalDecoder] | None) -> None:
        self.request = request
        self.abandoned: list[int] = []
        params = request.params
        self._simple = (
            params.n == 1
            and not params.stop_strings
            and params.logprobs is None
            and params.prompt_logprobs is None
            and request.pooling is None
        )
        self._answers = [
            _Answer(
                decoder() if decoder else None,
                StopMatcher(params.stop_strings, params.include_stop_str_in_output),
            )
            for _ in range(params.n)
        ]

    @classmethod
    def of(cls, request: Request, tokenizer: Detokenizes | None) -> Answers:
        """Of a request to a model; without a tokenizer answers are token ids alone."""
        if tokenizer is None:
            return cls(request, None)
        skip = request.params.skip_special_tokens
        return cls(request, lambda: tokenizer.detokenizer(skip))

    def take_abandoned(self) -> list[int]:
        """What was abandoned since the last call."""
        abandoned, self.abandoned = self.abandoned, []
        return abandoned

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self._answers)

    @property
    def unfinished(self) -> list[int]:
        return [index for index, answer in enumerate(self._answers) if not answer.finished]

    def feed(self, events: list[TokenEvent]) -> RequestDelta | None:
        """Deltas of one step. None if nothing is new for the user."""
        if self._simple:
            return self._feed_simple(events)
        new: dict[int, _New] = {}
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        embedding: bytes | None = None
        cached, started = 0, 0.0
        for event in events:
            embedding = event.embedding or embedding
            cached = max(cached, event.num_cached_tokens)
            started = started or event.started
            if event.prompt_logprobs is not None:
                prompt_logprobs = (None, *event.prompt_logprobs)
            answer = self._answers[event.index]
            if not answer.finished:
                self._take(answer, event, new.setdefault(event.index, _New()))
        if not new and prompt_logprobs is None:
            return None
        wants_logprobs = self.request.params.logprobs is not None
        return RequestDelta(
            request_id=self.request.request_id,
            completions=tuple(
                CompletionDelta(
                    index=index,
                    text=gain.text,
                    token_ids=tuple(gain.token_ids),
                    logprobs=tuple(gain.logprobs) if wants_logprobs else None,
                    finish_reason=gain.finish_reason,
                    stop_reason=gain.stop_reason,
                    error=gain.error,
                )
                for index, gain in sorted(new.items())
            ),
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=cached,
            prompt_logprobs=prompt_logprobs,
            finished=self.finished,
            started=started,
            embedding=embedding,
        )

    def _feed_simple(self, events: list[TokenEvent]) -> RequestDelta | None:
        """One answer, of which nothing but text is wanted: most requests, hundreds a step.

        Tokens of several steps become text at once.
        """
        answer = self._answers[0]
        if answer.finished:
            return None
        last = events[0]
        token_ids, cached, started = last.token_ids, last.num_cached_tokens, last.started
        if len(events) > 1:
            gained: list[int] = []
            for last in events:
                gained += last.token_ids
                cached = max(cached, last.num_cached_tokens)
                started = started or last.started
                if last.finish_reason is not None:
                    break
            token_ids = tuple(gained)
        reason = last.finish_reason
        text = ""
        if answer.decoder is not None:
            # The token that ends an answer is not part of its text.
            shown = token_ids[:-1] if reason == "stop" and last.token_ids else token_ids
            text = answer.decoder.push(shown)
            if reason is not None:
                text += answer.decoder.flush()
        answer.finished = reason is not None
        new = CompletionDelta(0, text, token_ids, None, reason, last.stop_reason, last.error)
        return RequestDelta(
            self.request.request_id,
            (new,),
            len(self.request.prompt_token_ids),
            cached,
            None,
            answer.finished,
            started,
        )

    def _take(self, answer: _Answer, event: TokenEvent, gain: _New) -> None:
        logprobs = event.logprobs or ()
        stopped_by_token = event.finish_reason == "stop"
        min_tokens = self.request.params.min_tokens
        for position, token_id in enumerate(event.token_ids):
            gain.token_ids.append(token_id)
            if logprobs:
                gain.logprobs.append(logprobs[position])
            if stopped_by_token and position == len(event.token_ids) - 1:
                break  # the token that ends an answer is not part of its text
            if answer.decoder is None:
                continue
            answer.num_tokens += 1
            text, stop = answer.stops.push(
                answer.decoder.push((token_id,)), early=answer.num_tokens <= min_tokens
            )
            gain.text += text
            if stop is not None:
                gain.finish_reason, gain.stop_reason = "stop", stop
                answer.finished = True
                if event.finish_reason is None:
                    self.abandoned.append(event.index)
                return
        if event.finish_reason is not None:
            answer.finished = True
            gain.finish_reason = event.finish_reason
            gain.stop_reason = event.stop_reason
            gain.error = event.error
            if answer.decoder is not None:
                early = answer.num_tokens <= min_tokens
                text, stop = answer.stops.push(answer.decoder.flush(), early=early)
                gain.text += text if stop is not None else text + answer.stops.flush()
                if stop is not None and event.finish_reason == "length":
                    gain.finish_reason, gain.stop_reason = "stop", stop
