"""A request as data, answered without HTTP: what lines of a batch are run by."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from halyard.api.chat_answers import ChatAnswers
from halyard.api.chat_run import plan_chat, start_chat
from halyard.api.completion_answers import CompletionAnswers
from halyard.api.convert import completion_params, completion_prompts, decode_body
from halyard.api.deps import new_id
from halyard.api.embedding_run import EmbeddingRun
from halyard.api.errors import to_api_error
from halyard.api.generation import Generation
from halyard.api.host import EngineHost
from halyard.api.response_answers import ResponseAnswers
from halyard.api.response_convert import as_chat, input_blamed
from halyard.api.schemas.chat import ChatCompletionRequest
from halyard.api.schemas.completions import CompletionRequest
from halyard.api.schemas.embeddings import EmbeddingRequest
from halyard.api.schemas.responses import ResponseRequest
from halyard.api.tokens import TokenWriter
from halyard.hal.errors import RequestError

__all__ = ["ENDPOINTS", "answer"]


async def answer(host: EngineHost, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) as the endpoint would have answered; errors too."""
    try:
        endpoint = ENDPOINTS.get(url)
        if endpoint is None:
            raise RequestError(f"url must be one of {', '.join(ENDPOINTS)}, got {url!r}", "url")
        if body.get("stream"):
            raise RequestError("a batch has nobody to stream to: leave stream out", "stream")
        return 200, await endpoint(host, msgspec.json.encode(body))
    except Exception as error:  # noqa: BLE001 - the boundary: becomes the line's answer
        told = to_api_error(error)
        return told.status, msgspec.json.decode(told.body())


async def _chat(host: EngineHost, body: bytes) -> dict[str, Any]:
    asked = decode_body(body, ChatCompletionRequest)
    model = host.check_model(asked.model)
    plan = await plan_chat(host.client, asked)
    generation = start_chat(asked, plan)
    writer = TokenWriter(plan.client.tokenizer, bool(asked.return_tokens_as_token_ids))
    try:
        return _plain(await ChatAnswers(generation, asked, model, writer, plan.rules).whole())
    finally:
        generation.cancel()


async def _complete(host: EngineHost, body: bytes) -> dict[str, Any]:
    asked = decode_body(body, CompletionRequest)
    client, model = host.client, host.check_model(asked.model)
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
    try:
        return _plain(await CompletionAnswers(generation, asked, model, client.tokenizer).whole())
    finally:
        generation.cancel()


async def _respond(host: EngineHost, body: bytes) -> dict[str, Any]:
    asked = decode_body(body, ResponseRequest)
    if asked.previous_response_id is not None or asked.background:
        name = "background" if asked.background else "previous_response_id"
        raise RequestError(f"{name} has no place in a batch", name)
    model = host.check_model(asked.model)
    chat = as_chat(asked, [])
    with input_blamed():
        plan = await plan_chat(host.client, chat)
        generation = start_chat(chat, plan, new_id("resp").replace("-", "_"))
    try:
        return await ResponseAnswers(
            generation, asked, model, plan.rules, generation.fingerprint
        ).run()
    finally:
        generation.cancel()


async def _embed(host: EngineHost, body: bytes) -> dict[str, Any]:
    run = EmbeddingRun(host, decode_body(body, EmbeddingRequest))
    await run.check()
    try:
        return _plain(await run.whole())
    finally:
        run.cancel()


def _plain(value: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(value)
    return plain


ENDPOINTS: dict[str, Callable[[EngineHost, bytes], Awaitable[dict[str, Any]]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _complete,
    "/v1/embeddings": _embed,
    "/v1/responses": _respond,
}
