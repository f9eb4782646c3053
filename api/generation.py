"""One HTTP request's generation: one stream a prompt, their deltas merged, usage counted."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from halyard.api.context import current
from halyard.api.errors import DeadlineError
from halyard.api.schemas.common import CompletionUsage, PromptTokensDetails
from halyard.api.tenants import caller
from halyard.hal.errors import DeviceMemoryError, EngineDeadError, HalyardError, RequestError
from halyard.runtime.client import Client, RequestStream
from halyard.runtime.engine import ASLEEP, OUT_OF_MEMORY
from halyard.runtime.masks import TOO_COMPLEX
from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import SamplingParams

__all__ = ["DEADLINE", "Generation", "failure_of"]

DEADLINE = "deadline"  # stop_reason of an answer that its time cut short


def failure_of(stream: RequestStream, error: str) -> HalyardError:
    """What an error that the engine tells of a request is to its client."""
    if stream.given_up or error == ASLEEP:
        return EngineDeadError(error, retry_after=1.0)
    if error.startswith(OUT_OF_MEMORY):
        return DeviceMemoryError(error)
    return HalyardError(error)


class Generation:
    """Every prompt of an HTTP request, submitted in its caller's name and within the caller's limits.

    Args:
        timeout: seconds; then the answer ends as it is. The caller's deadline, if earlier, does too.

    Raises:
        HalyardError: one of them is refused; then none runs.
    """

    def __init__(
        self,
        client: Client,
        answer_id: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        priority: int | None = None,
        cache_salt: str | None = None,
        drop_answer: bool = False,
        timeout: float | None = None,
    ) -> None:
        who = caller()
        queue = client.port.facts.max_queue_len
        if queue is not None and len(prompts) > queue:  # there would never be room for all of them
            raise RequestError(
                f"at most {queue} prompts are taken here, got {len(prompts)}", "prompt"
            )
        params = who.fit(params, max(map(len, prompts), default=0))
        self.fingerprint = client.fingerprint  # of what makes the answers
        self.answer_id = answer_id
        self.prompts = prompts
        self.params = params
        self.drop_answer = drop_answer  # max_tokens 0: the prompt alone was of interest
        self._client = client
        self._streams: list[RequestStream] = []
        self._answer_tokens = 0
        self._begun = False
        self._cached_tokens = [0] * len(prompts)
        self._log = who.prompt_log
        self._logged: dict[tuple[int, int], list[str]] = {}
        context = current.get()
        self._request_id = context.request_id if context is not None else ""
        self._alarm: asyncio.TimerHandle | None = None
        self._admission = who.admit(sum(map(len, prompts)))
        try:
            deadline = who.until(timeout)
            for number, prompt in enumerate(prompts):
                options = who.submit_options(f"{answer_id}-{number}", priority, cache_salt)
                stream = client.submit(prompt, params, **options)
                self._streams.append(stream)
            if deadline is not None:
                self._alarm = asyncio.get_running_loop().call_at(deadline, self._expire)
        except BaseException:
            self._admission.withdraw()
            self.cancel()
            raise
        if context is not None and context.traces is not None:
            requests = [stream.request for stream in self._streams]
            context.traces.watch(requests, client.model_name)

    def cancel(self) -> None:
        """Free everything that still runs. Idempotent."""
        for stream in self._streams:
            stream.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        self._admission.end(sum(self._cached_tokens))
        if self._log is not None:
            log, self._log = self._log, None
            answers = ["".join(texts) for _, texts in sorted(self._logged.items())]
            log.write(
                self._request_id, self.answer_id, list(map(self._text, self.prompts)), answers
            )

    def _text(self, prompt: list[int]) -> str:
        tokenizer = self._client.tokenizer
        if tokenizer is None:
            return str(prompt)
        return tokenizer.decode(prompt, skip_special_tokens=False)

    def _expire(self) -> None:
        for stream in self._streams:
            stream.cut(DEADLINE)

    def usage(self) -> CompletionUsage:
        """Token counts so far."""
        prompt_tokens = sum(map(len, self.prompts))
        return CompletionUsage(
            prompt_tokens,
            self._answer_tokens,
            prompt_tokens + self._answer_tokens,
            PromptTokensDetails(sum(self._cached_tokens)),
        )

    async def deltas(self) -> AsyncIterator[tuple[int, RequestDelta]]:
        """(prompt number, delta) as they come.

        Raises:
            HalyardError: an answer failed; the other answers are cancelled.
        """
        try:
            if len(self._streams) == 1:
                async for delta in self._streams[0]:
                    yield 0, self._count(0, delta)
                return
            async for number, delta in self._merged():
                yield number, self._count(number, delta)
        finally:
            self.cancel()

    async def _merged(self) -> AsyncIterator[tuple[int, RequestDelta]]:
        # Bounded: what a slow reader leaves behind is the streams' business.
        queue: asyncio.Queue[tuple[int, RequestDelta] | None] = asyncio.Queue(
            2 * len(self._streams)
        )

        async def pump(number: int, stream: RequestStream) -> None:
            async for delta in stream:
                await queue.put((number, delta))
            await queue.put(None)

        tasks = [
            asyncio.create_task(pump(number, stream)) for number, stream in enumerate(self._streams)
        ]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def _count(self, number: int, delta: RequestDelta) -> RequestDelta:
        self._cached_tokens[number] = max(self._cached_tokens[number], delta.num_cached_tokens)
        for new in delta.completions:
            if new.error is not None:
                if new.error == TOO_COMPLEX and self.params.guided is not None:
                    raise RequestError(new.error, self.params.guided.param)
                raise failure_of(self._streams[number], new.error)
            self._begun = self._begun or bool(new.token_ids)
            if new.stop_reason == DEADLINE and not self._begun:
                raise DeadlineError("the time given to this request passed before its answer began")
            if self._log is not None:
                self._logged.setdefault((number, new.index), []).append(new.text)
            self._admission.spend(len(new.token_ids))
            if not self.drop_answer:
                self._answer_tokens += len(new.token_ids)
        return delta
