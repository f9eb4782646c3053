"""POST /v1/embeddings."""

from typing import Any

from litestar import Controller, Request, post
from litestar.openapi import ResponseSpec
from litestar.types import ASGIApp

from halyard.api.convert import decode_body
from halyard.api.deps import error_observer, host_of
from halyard.api.embedding_run import EmbeddingRun
from halyard.api.openapi import body_of
from halyard.api.schemas.common import ErrorEnvelope
from halyard.api.schemas.embeddings import EmbeddingList, EmbeddingRequest
from halyard.api.sse import JsonAnswer

__all__ = ["EmbeddingController"]


class EmbeddingController(Controller):
    """Texts become vectors."""

    path = "/v1/embeddings"
    tags = ("OpenAI",)

    @post(
        status_code=200,
        operation_class=body_of(EmbeddingRequest),
        responses={
            200: ResponseSpec(EmbeddingList, description="One vector an input"),
            400: ResponseSpec(ErrorEnvelope, description="The request is invalid"),
        },
    )
    async def create(self, request: Request[Any, Any, Any]) -> ASGIApp:
        """The model's final hidden states, pooled."""
        host = host_of(request)
        run = EmbeddingRun(host, decode_body(await request.body(), EmbeddingRequest))
        await run.check()
        return JsonAnswer(run.whole(), run.cancel, error_observer(host, request))
