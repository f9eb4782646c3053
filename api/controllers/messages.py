"""POST /v1/messages: Anthropic's API."""

from typing import Any

from litestar import Controller, Request, Response, post
from litestar.openapi import ResponseSpec
from litestar.types import ASGIApp

from halyard.api.chat_run import plan_chat, start_chat
from halyard.api.convert import decode_body
from halyard.api.deps import error_observer, host_of, new_id
from halyard.api.errors import exception_handler, to_api_error
from halyard.api.message_answers import MessageAnswers, error_body, error_event
from halyard.api.message_convert import as_chat
from halyard.api.openapi import body_of
from halyard.api.schemas.messages import CountTokensRequest, Message, MessageRequest
from halyard.api.sse import EventStream, JsonAnswer

__all__ = ["MessageController"]


def _refuse(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """As everywhere, in Anthropic's envelope."""
    answer = exception_handler(request, error)
    return Response(
        content=error_body(to_api_error(error)),
        status_code=answer.status_code,
        media_type="application/json",
        headers=dict(answer.headers),
    )


class MessageController(Controller):
    """Conversations for Anthropic's clients."""

    path = "/v1/messages"
    tags = ("Anthropic",)
    exception_handlers = {Exception: _refuse}  # noqa: RUF012 - litestar reads it off the class

    @post(
        status_code=200,
        operation_class=body_of(MessageRequest),
        responses={200: ResponseSpec(Message, description="The answer, or server-sent events")},
    )
    async def create(self, request: Request[Any, Any, Any]) -> ASGIApp:
        """Answer a conversation."""
        host = host_of(request)
        asked = decode_body(await request.body(), MessageRequest)
        client = host.client
        model = host.check_model(asked.model)
        chat = as_chat(asked)
        plan = await plan_chat(client, chat)
        generation = start_chat(chat, plan, new_id("msg").replace("-", "_"))
        answers = MessageAnswers(generation, model, plan.rules)
        observe = error_observer(host, request)
        if asked.stream:
            return EventStream(answers.events(), generation.cancel, observe, error_event)
        return JsonAnswer(answers.whole(), generation.cancel, observe, error_body)

    @post("/count_tokens", status_code=200, operation_class=body_of(CountTokensRequest))
    async def count_tokens(self, request: Request[Any, Any, Any]) -> dict[str, int]:
        """How many tokens a conversation has."""
        host = host_of(request)
        asked = decode_body(await request.body(), CountTokensRequest)
        client = host.client  # before its name: while it loads none is known
        host.check_model(asked.model)
        plan = await plan_chat(client, as_chat(asked))
        return {"input_tokens": len(plan.prompt)}
