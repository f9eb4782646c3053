"""POST /v1/chat/completions."""

from typing import Any

from litestar import Controller, Request, post
from litestar.openapi import ResponseSpec
from litestar.types import ASGIApp

from halyard.api.chat_answers import ChatAnswers
from halyard.api.chat_run import plan_chat, start_chat
from halyard.api.convert import decode_body
from halyard.api.deps import error_observer, host_of
from halyard.api.openapi import body_of
from halyard.api.schemas.chat import ChatCompletion, ChatCompletionRequest
from halyard.api.schemas.common import ErrorEnvelope
from halyard.api.sse import EventStream, JsonAnswer
from halyard.api.tokens import TokenWriter

__all__ = ["ChatController"]


class ChatController(Controller):
    """Conversations, by the checkpoint's own template."""

    path = "/v1/chat/completions"
    tags = ("OpenAI",)

    @post(
        status_code=200,
        operation_class=body_of(ChatCompletionRequest),
        responses={
            200: ResponseSpec(ChatCompletion, description="The answer, or server-sent events"),
            400: ResponseSpec(ErrorEnvelope, description="The request is invalid"),
        },
    )
    async def create(self, request: Request[Any, Any, Any]) -> ASGIApp:
        """Answer a conversation."""
        host = host_of(request)
        asked = decode_body(await request.body(), ChatCompletionRequest)
        client = host.client
        model = host.check_model(asked.model)
        plan = await plan_chat(client, asked)
        generation = start_chat(asked, plan)
        writer = TokenWriter(client.tokenizer, bool(asked.return_tokens_as_token_ids))
        answers = ChatAnswers(generation, asked, model, writer, plan.rules)
        observe = error_observer(host, request)
        if asked.stream:
            return EventStream(answers.events(), generation.cancel, observe)
        return JsonAnswer(answers.whole(), generation.cancel, observe)
