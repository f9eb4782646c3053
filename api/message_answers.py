"""Blocks become Anthropic's messages: whole ones and streamed ones."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from halyard.api.answer_reader import ReadingRules
from halyard.api.blocks import Block, BlockEvent, Blocks
from halyard.api.errors import ApiError
from halyard.api.generation import Generation
from halyard.api.schemas.messages import Message, MessageUsage
from halyard.api.sse import named_event

__all__ = ["MessageAnswers", "error_body", "error_event"]

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessageAnswers:
    """Writes one request's answer."""

    def __init__(self, generation: Generation, model: str, rules: ReadingRules) -> None:
        self._generation = generation
        self._model = model
        self._blocks = Blocks(generation, rules)

    async def whole(self) -> Message:
        await self._blocks.finish()
        reason, sequence = self._stop()
        content = [_block(block) for block in self._blocks.blocks]
        return Message(
            self._generation.answer_id, self._model, content, reason, sequence, self._usage()
        )

    async def events(self) -> AsyncIterator[bytes]:
        start = Message(self._generation.answer_id, self._model, [], None, None, self._usage())
        yield named_event("message_start", message=start)
        yield named_event("ping")
        async for event in self._blocks.events():
            yield self._event(event)
        reason, sequence = self._stop()
        stop = {"stop_reason": reason, "stop_sequence": sequence}
        yield named_event("message_delta", delta=stop, usage=self._usage())
        yield named_event("message_stop")

    def _event(self, event: BlockEvent) -> bytes:
        place = event.block.place
        match event.what:
            case "start":  # the block itself may have grown already
                empty = Block(event.block.kind, place, event.block.call_id, event.block.name)
                return named_event("content_block_start", index=place, content_block=_block(empty))
            case "grow":
                return named_event("content_block_delta", index=place, delta=_delta(event))
        return named_event("content_block_stop", index=place)

    def _stop(self) -> tuple[str, str | None]:
        blocks = self._blocks
        if blocks.finish_reason == "length":
            return "max_tokens", None
        if blocks.has_calls:
            return "tool_use", None
        if isinstance(blocks.stop_reason, str):
            return "stop_sequence", blocks.stop_reason
        return "end_turn", None

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)


def _block(block: Block) -> dict[str, Any]:
    match block.kind:
        case "thought":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "text":
            return {"type": "text", "text": block.text}
    try:
        value = json.loads(block.text or "{}")
    except ValueError:  # cut off
        value = {}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": value}


def _delta(event: BlockEvent) -> dict[str, Any]:
    match event.block.kind:
        case "thought":
            return {"type": "thinking_delta", "thinking": event.text}
        case "text":
            return {"type": "text_delta", "text": event.text}
    return {"type": "input_json_delta", "partial_json": event.text}


def error_body(error: ApiError) -> bytes:
    """A failure in Anthropic's envelope."""
    kind = _KINDS.get(error.status, "api_error")
    told = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return msgspec.json.encode({"type": "error", "error": told})


def error_event(error: ApiError) -> bytes:
    return b"event: error\ndata: " + error_body(error) + b"\n\n"
