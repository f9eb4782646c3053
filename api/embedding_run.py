"""An embeddings request: its inputs in bounded company, their vectors in order."""

import asyncio
from base64 import b64encode

from halyard.api.context import current
from halyard.api.convert import token_prompts
from halyard.api.deps import new_id, now
from halyard.api.errors import DeadlineError
from halyard.api.generation import failure_of
from halyard.api.host import EngineHost
from halyard.api.limits import Admission
from halyard.api.schemas.common import PromptTokensDetails
from halyard.api.schemas.embeddings import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)
from halyard.api.tenants import caller
from halyard.hal.errors import ContextLengthError, QueueFullError, RequestError
from halyard.runtime.client import Client, RequestStream
from halyard.runtime.embedding import check_dimensions, finish_embedding
from halyard.runtime.outputs import RequestDelta
from halyard.runtime.request import RequestOptions

__all__ = ["MAX_INPUTS", "EmbeddingRun"]

MAX_INPUTS = 2048  # as OpenAI's
_AT_ONCE = 32  # inputs of one HTTP request that are with the engine together
_AGAIN = 0.05  # seconds until an input that found no room in the queue comes again


class EmbeddingRun:
    """One HTTP request's embeddings. `cancel` frees what still runs."""

    def __init__(self, host: EngineHost, request: EmbeddingRequest) -> None:
        self._host = host
        self._client: Client = host.client
        self._request = request
        self._model = host.check_model(request.model)
        self._id = new_id("embd")
        self._prompts: list[list[int]] = []
        self._streams: set[RequestStream] = set()
        self._cached_tokens = 0
        self._taken = False  # the engine has one of its inputs, or had
        self._who = caller()
        self._admission: Admission | None = None  # None: not begun

    async def check(self) -> None:
        """Read the inputs; nothing runs yet.

        Raises:
            RequestError, ContextLengthError: one of them, or a parameter, is invalid.
        """
        request = self._request
        check_dimensions(request.dimensions, self._client.hidden_size)
        count = len(request.input) if isinstance(request.input, list) else 1
        several = count > 1 and not all(isinstance(one, int) for one in request.input)
        if several and count > MAX_INPUTS:
            raise RequestError(f"at most {MAX_INPUTS} inputs are taken, got {count}", "input")
        most = request.truncate_prompt_tokens
        self._prompts = await token_prompts(
            request.input,
            self._client.tokenizer,
            add_special_tokens=request.add_special_tokens is not False,
            truncate=self._client.max_model_len if most == -1 else most,
            param="input",
        )
        for number, prompt in enumerate(self._prompts):
            try:
                self._client.check_input(prompt)
            except RequestError as error:
                if len(self._prompts) == 1:
                    raise
                kind = ContextLengthError if isinstance(error, ContextLengthError) else RequestError
                raise kind(f"input {number}: {error}", "input") from None
        most = self._who.tenant.max_context
        longest = max(map(len, self._prompts))
        if most is not None and longest > most:
            raise ContextLengthError(
                f"this key's maximum context length is {most} tokens, the input has {longest}: "
                "shorten the input",
                "input",
            )

    async def whole(self) -> EmbeddingList:
        """Run them all, in the caller's name and within the caller's limits.

        Raises:
            HalyardError: one of them failed; the others are cancelled.
        """
        self._admission = self._who.admit(sum(map(len, self._prompts)))
        self._log()
        gate = asyncio.Semaphore(_AT_ONCE)
        tasks = [
            asyncio.ensure_future(self._one(number, gate)) for number in range(len(self._prompts))
        ]
        deadline = self._who.until(None)
        try:
            async with asyncio.timeout_at(deadline):
                vectors = await asyncio.gather(*tasks)
        except TimeoutError:
            raise DeadlineError(
                "the time given to this request passed before all embeddings were there"
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            if not self._taken:
                self._admission.withdraw()
            self.cancel()
        tokens = sum(map(len, self._prompts))
        return EmbeddingList(
            id=self._id,
            created=now(),
            model=self._model,
            data=[Embedding(number, vector) for number, vector in enumerate(vectors)],
            usage=EmbeddingUsage(tokens, tokens, PromptTokensDetails(self._cached_tokens)),
            system_fingerprint=self._host.fingerprint,
        )

    def cancel(self) -> None:
        """Free everything that still runs. Idempotent."""
        for stream in self._streams:
            stream.cancel()
        self._streams.clear()
        if self._admission is not None:
            self._admission.end(self._cached_tokens)

    def _log(self) -> None:
        if self._who.prompt_log is None:
            return
        context, tokenizer = current.get(), self._client.tokenizer
        texts = [
            str(prompt)
            if tokenizer is None
            else tokenizer.decode(prompt, skip_special_tokens=False)
            for prompt in self._prompts
        ]
        request_id = context.request_id if context is not None else ""
        self._who.prompt_log.write(request_id, self._id, texts, [])

    async def _one(self, number: int, gate: asyncio.Semaphore) -> list[float] | str:
        request = self._request
        async with gate:
            options = self._who.submit_options(
                f"{self._id}-{number}", request.priority, request.cache_salt
            )
            stream = await self._begin(number, options)
            self._streams.add(stream)
            pooled = b""
            async for delta in stream:
                pooled = self._take(stream, delta) or pooled
            self._streams.discard(stream)
        vector = finish_embedding(pooled, request.dimensions, request.normalize is not False)
        if request.encoding_format == "base64":
            return b64encode(vector.astype("<f4").tobytes()).decode()
        values: list[float] = vector.tolist()
        return values

    async def _begin(self, number: int, options: RequestOptions) -> RequestStream:
        """Queue one input. Once one of them was taken, the others wait where there is no room now."""
        pooling = self._request.pooling or "last"
        while True:
            try:
                stream = self._client.embed(self._prompts[number], pooling, **options)
            except QueueFullError:
                if not self._taken:
                    raise
                await asyncio.sleep(_AGAIN)
            else:
                self._taken = True
                return stream

    def _take(self, stream: RequestStream, delta: RequestDelta) -> bytes | None:
        for new in delta.completions:
            if new.error is not None:
                raise failure_of(stream, new.error)
        self._cached_tokens += delta.num_cached_tokens
        return delta.embedding
