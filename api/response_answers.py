"""Blocks become responses: whole ones and streamed ones."""

from collections.abc import AsyncIterator
from typing import Any

from halyard.api.answer_reader import ReadingRules
from halyard.api.blocks import Block, BlockEvent, Blocks
from halyard.api.deps import now
from halyard.api.errors import to_api_error
from halyard.api.generation import Generation
from halyard.api.schemas.chat import InputMessage
from halyard.api.schemas.responses import ResponseRequest
from halyard.api.sse import named_event

__all__ = ["ResponseAnswers"]


class ResponseAnswers:
    """Writes one request's answer, and knows at any time what it looks like."""

    def __init__(
        self,
        generation: Generation,
        request: ResponseRequest,
        model: str,
        rules: ReadingRules,
        fingerprint: str,
    ) -> None:
        self.generation = generation
        self.status = "in_progress"
        self._request = request
        self._model = model
        self._fingerprint = fingerprint
        self._blocks = Blocks(generation, rules)
        self._error: dict[str, str] | None = None
        self._created = now()
        self._number = 0

    async def run(self) -> dict[str, Any]:
        """The whole response.

        Raises:
            HalyardError: the answer failed.
        """
        async for _ in self._read():
            pass
        return self.response()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last one holds the whole response."""
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())
        async for event in self._read():
            for line in self._tell(event):
                yield line
        yield self._event(f"response.{self.status}", response=self.response())

    async def _read(self) -> AsyncIterator[BlockEvent]:
        try:
            async for event in self._blocks.events():
                yield event
        except Exception as error:
            told = to_api_error(error)
            self.status = "failed"
            self._error = {"code": "server_error", "message": told.message}
            raise
        if self.status == "in_progress":
            if self._blocks.finish_reason is None:
                self.status = "cancelled"
            else:
                length = self._blocks.finish_reason == "length"
                self.status = "incomplete" if length else "completed"

    def cancel(self) -> None:
        """Give it up."""
        if self.status == "in_progress":
            self.status = "cancelled"
        self.generation.cancel()

    def answer(self) -> list[InputMessage]:
        """What a later request goes on with."""
        text = "".join(block.text for block in self._blocks.blocks if block.kind == "text")
        calls = [
            {"id": block.call_id, "type": "function",
             "function": {"name": block.name, "arguments": block.text}}
            for block in self._blocks.blocks if block.kind == "call"
        ]  # fmt: skip
        return [InputMessage("assistant", text or None, tool_calls=calls or None)]

    def response(self) -> dict[str, Any]:
        """As it is now."""
        request, usage = self._request, self.generation.usage()
        short = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self.generation.answer_id,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "background": bool(request.background),
            "error": self._error,
            "incomplete_details": short,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": [_item(block, self._state(block)) for block in self._blocks.blocks],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": request.reasoning or {"effort": None, "summary": None},
            "store": request.store is not False,
            "system_fingerprint": self._fingerprint,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": request.truncation or "disabled",
            "user": request.user,
            "usage": None
            if self.status == "in_progress"
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.prompt_tokens_details.cached_tokens
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
        }

    def _state(self, block: Block) -> str:
        last = block.place == len(self._blocks.blocks) - 1
        return "completed" if self.status == "completed" or not last else self.status

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event(name, sequence_number=number, **fields)

    def _tell(self, event: BlockEvent) -> list[bytes]:
        block = event.block
        place: dict[str, Any] = {"output_index": block.place}
        item = place | {"item_id": block.block_id}
        inner = item | {"content_index": 0}
        stem = {"thought": "reasoning_text", "text": "output_text"}.get(block.kind, "")
        extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        match event.what, block.kind:
            case "start", _:  # the block itself may have grown already
                empty = Block(block.kind, block.place, block.call_id, block.name,
                              block_id=block.block_id)  # fmt: skip
                new = _item(empty, "in_progress")
                if stem:
                    new["content"] = []
                lines = [self._event("response.output_item.added", item=new, **place)]
                if stem:
                    part = _part(empty)
                    lines.append(self._event("response.content_part.added", part=part, **inner))
                return lines
            case "grow", "call":
                name = "response.function_call_arguments.delta"
                return [self._event(name, delta=event.text, **item)]
            case "grow", _:
                return [self._event(f"response.{stem}.delta", delta=event.text, **inner, **extra)]
            case _, "call":
                name = "response.function_call_arguments.done"
                lines = [self._event(name, arguments=block.text, name=block.name, **item)]
            case _:
                lines = [
                    self._event(f"response.{stem}.done", text=block.text, **inner, **extra),
                    self._event("response.content_part.done", part=_part(block), **inner),
                ]
        done = _item(block, "completed")
        return [*lines, self._event("response.output_item.done", item=done, **place)]


def _item(block: Block, status: str) -> dict[str, Any]:
    match block.kind:
        case "thought":
            return {"id": block.block_id, "type": "reasoning", "summary": [],
                    "content": [_part(block)], "status": status}  # fmt: skip
        case "text":
            return {"id": block.block_id, "type": "message", "role": "assistant",
                    "status": status, "content": [_part(block)]}  # fmt: skip
    return {"id": block.block_id, "type": "function_call", "call_id": block.call_id,
            "name": block.name, "arguments": block.text, "status": status}  # fmt: skip


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "thought":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
