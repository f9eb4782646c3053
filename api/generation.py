"""One HTTP request's generation: one stream a prompt, their deltas merged, usage counted."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from halyard.api.context import current
from halyard.api.schemas.common import CompletionUsage, PromptTokensDetails
from halyard.hal.errors import EngineDeadError, HalyardError, RequestError
from halyard.runtime.client import SHUTTING_DOWN, Client, RequestStream
from halyard.runtime.guided import TOO_COMPLEX
from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import SamplingParams

__all__ = ["Generation"]


class Generation:
    """Every prompt of an HTTP request, submitted.

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
        fingerprint: str | None = None,
    ) -> None:
        self.fingerprint = fingerprint  # of what makes the answers
        self.answer_id = answer_id
        self.prompts = prompts
        self.params = params
        self.drop_answer = drop_answer  # max_tokens 0: the prompt alone was of interest
        self._client = client
        self._streams: list[RequestStream] = []
        self._answer_tokens = 0
        self._cached_tokens = [0] * len(prompts)
        try:
            for number, prompt in enumerate(prompts):
                stream = client.submit(
                    prompt,
                    params,
                    request_id=f"{answer_id}-{number}",
                    priority=priority or 0,
                    cache_salt=cache_salt or "",
                )
                self._streams.append(stream)
        except BaseException:
            self.cancel()
            raise
        context = current.get()
        if context is not None and context.traces is not None:
            requests = [stream.request for stream in self._streams]
            context.traces.watch(requests, client.model_name)

    def cancel(self) -> None:
        """Free everything that still runs. Idempotent."""
        for stream in self._streams:
            stream.cancel()

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
        queue: asyncio.Queue[tuple[int, RequestDelta] | None] = asyncio.Queue()

        async def pump(number: int, stream: RequestStream) -> None:
            async for delta in stream:
                queue.put_nowait((number, delta))
            queue.put_nowait(None)

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
                if new.error == SHUTTING_DOWN or self._client.error is not None:
                    raise EngineDeadError(new.error)
                if new.error == TOO_COMPLEX and self.params.guided is not None:
                    raise RequestError(new.error, self.params.guided.param)
                raise HalyardError(new.error)
            if not self.drop_answer:
                self._answer_tokens += len(new.token_ids)
        return delta
