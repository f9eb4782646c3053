"""One answer as a row of blocks: thoughts, texts and calls, in the order they come."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from halyard.api.answer_reader import AnswerReader, Piece, ReadingRules
from halyard.api.deps import new_id
from halyard.api.generation import Generation

__all__ = ["Block", "BlockEvent", "Blocks"]

_PREFIXES = {"thought": "rs", "text": "msg", "call": "fc"}


@dataclass(slots=True)
class Block:
    """A part of an answer."""

    kind: Literal["thought", "text", "call"]
    place: int  # counts from 0
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    block_id: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A block starts, grows or ends."""

    what: Literal["start", "grow", "end"]
    block: Block
    text: str = ""  # what it grew by


class Blocks:
    """Follows the only answer of a generation."""

    def __init__(self, generation: Generation, rules: ReadingRules) -> None:
        self.blocks: list[Block] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._generation = generation
        self._reader = AnswerReader(rules)
        self._open: Block | None = None

    @property
    def has_calls(self) -> bool:
        return any(block.kind == "call" for block in self.blocks)

    async def events(self) -> AsyncIterator[BlockEvent]:
        """What happens, until the answer's end.

        Raises:
            HalyardError: the answer failed.
        """
        async for _, delta in self._generation.deltas():
            for new in delta.completions:
                piece = self._reader.push(new.text, new.finish_reason is not None)
                for event in self._grow(piece):
                    yield event
                if new.finish_reason is not None:
                    self.finish_reason, self.stop_reason = new.finish_reason, new.stop_reason
        for event in self._close():
            yield event

    async def finish(self) -> None:
        """Read to the end."""
        async for _ in self.events():
            pass

    def _grow(self, piece: Piece) -> list[BlockEvent]:
        events: list[BlockEvent] = []
        parts: tuple[tuple[Literal["thought", "text"], str], ...] = (
            ("thought", piece.thought),
            ("text", piece.content),
        )
        for kind, text in parts:
            if text:
                if self._open is None or self._open.kind != kind:
                    events += [*self._close(), self._start(Block(kind, len(self.blocks)))]
                events.append(self._add(text))
        for call in piece.calls:
            if call.call_id is not None:
                block = Block("call", len(self.blocks), call.call_id, call.name or "")
                events += [*self._close(), self._start(block)]
            if call.arguments:
                events.append(self._add(call.arguments))
        return events

    def _start(self, block: Block) -> BlockEvent:
        block.block_id = new_id(_PREFIXES[block.kind]).replace("-", "_")
        self.blocks.append(block)
        self._open = block
        return BlockEvent("start", block)

    def _add(self, text: str) -> BlockEvent:
        block = self.blocks[-1]
        block.pieces.append(text)
        return BlockEvent("grow", block, text)

    def _close(self) -> list[BlockEvent]:
        block, self._open = self._open, None
        return [] if block is None else [BlockEvent("end", block)]
