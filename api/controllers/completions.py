"""POST /v1/completions."""

from typing import Any

from litestar import Controller, Request, post
from litestar.openapi import ResponseSpec
from litestar.types import ASGIApp

from halyard.api.completion_answers import CompletionAnswers
from halyard.api.convert import completion_params, completion_prompts, decode_body
from halyard.api.deps import error_observer, host_of, new_id
from halyard.api.generation import Generation
from halyard.api.openapi import body_of
from halyard.api.schemas.common import ErrorEnvelope
from halyard.api.schemas.completions import Completion, CompletionRequest
from halyard.api.sse import EventStream, JsonAnswer

__all__ = ["CompletionController"]


class CompletionController(Controller):
    """Plain text goes on."""

    path = "/v1/completions"
    tags = ("OpenAI",)

    @post(
        status_code=200,
        operation_class=body_of(CompletionRequest),
        responses={
            200: ResponseSpec(Completion, description="The answer, or server-sent events"),
            400: ResponseSpec(ErrorEnvelope, description="The request is invalid"),
        },
    )
    async def create(self, request: Request[Any, Any, Any]) -> ASGIApp:
        """Complete one prompt or several."""
        host = host_of(request)
        asked = decode_body(await request.body(), CompletionRequest)
        client = host.client
        model = host.check_model(asked.model)
        params = completion_params(asked)
        prompts = await completion_prompts(asked, client.tokenizer, client.max_model_len)
        await client.prepare(params)
        generation = Generation(
            client,
            new_id("cmpl"),
            prompts,
            params,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            drop_answer=asked.max_tokens == 0,
            timeout=asked.timeout,
        )
        answers = CompletionAnswers(generation, asked, model, client.tokenizer)
        observe = error_observer(host, request)
        if asked.stream:
            return EventStream(answers.events(), generation.cancel, observe)
        return JsonAnswer(answers.whole(), generation.cancel, observe)
