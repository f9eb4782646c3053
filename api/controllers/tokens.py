"""POST /tokenize and /detokenize."""

import asyncio
from typing import Any

from litestar import Controller, Request, post

from halyard.api.chat_run import plan_chat
from halyard.api.convert import decode_body
from halyard.api.deps import host_of
from halyard.api.host import EngineHost
from halyard.api.openapi import body_of
from halyard.api.schemas.chat import ChatCompletionRequest
from halyard.api.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from halyard.hal.errors import RequestError
from halyard.models.tokenizer import Tokenizer

__all__ = ["TokenController"]


class TokenController(Controller):
    """Text to ids and back, as the model sees it."""

    tags = ("Tokens",)

    @post("/tokenize", status_code=200, operation_class=body_of(TokenizeRequest))
    async def tokenize(self, request: Request[Any, Any, Any]) -> TokenizeResponse:
        """Ids of a text or a conversation."""
        host = host_of(request)
        asked = decode_body(await request.body(), TokenizeRequest)
        tokenizer = _tokenizer(host, asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError("give prompt or messages, one of them", "prompt")
        if asked.messages is not None:
            chat = ChatCompletionRequest(
                messages=asked.messages,
                add_generation_prompt=asked.add_generation_prompt,
                continue_final_message=asked.continue_final_message,
                chat_template_kwargs=asked.chat_template_kwargs,
                tools=asked.tools,
            )
            tokens = (await plan_chat(host.client, chat)).prompt
        else:
            special = asked.add_special_tokens is not False
            tokens = await asyncio.to_thread(tokenizer.encode, asked.prompt or "", special)
        names: list[str] | None = None
        if asked.return_token_strs:  # there may be millions: never on the event loop
            names = await asyncio.to_thread(lambda: list(map(tokenizer.token_text, tokens)))
        return TokenizeResponse(len(tokens), host.client.max_model_len, tokens, names)

    @post("/detokenize", status_code=200, operation_class=body_of(DetokenizeRequest))
    async def detokenize(self, request: Request[Any, Any, Any]) -> DetokenizeResponse:
        """The text of ids, special ones included."""
        host = host_of(request)
        asked = decode_body(await request.body(), DetokenizeRequest)
        tokenizer = _tokenizer(host, asked.model)
        size = host.client.limits.vocab_size
        for token in asked.tokens:
            if not 0 <= token < size:
                raise RequestError(f"token id {token} is outside the vocabulary", "tokens")
        text = await asyncio.to_thread(tokenizer.decode, asked.tokens, skip_special_tokens=False)
        return DetokenizeResponse(text)


def _tokenizer(host: EngineHost, model: str | None) -> Tokenizer:
    tokenizer = host.client.tokenizer
    host.check_model(model)
    if tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer", "model")
    return tokenizer
