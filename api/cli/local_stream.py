"""One answer from an engine in this process, piece by piece, for the terminal commands."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from halyard.hal.errors import HalyardError, RequestError
from halyard.runtime.answer import Answers
from halyard.runtime.outputs import CompletionDelta
from halyard.runtime.request import SamplingParams

if TYPE_CHECKING:
    from halyard.models.tokenizer import Tokenizer
    from halyard.runtime.engine import Engine

__all__ = ["Interrupt", "stream_answer"]


class Interrupt:
    """Within `with`, Ctrl-C raises a flag instead of an exception that could hit mid-step."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> Interrupt:
        self.pressed = False
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, _signal: int, _frame: FrameType | None) -> None:
        if self.pressed:  # the second time: somebody means it
            raise KeyboardInterrupt
        self.pressed = True


def stream_answer(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    interrupt: Interrupt,
) -> Iterator[CompletionDelta]:
    """Deltas of one answer as they come; ends early when Ctrl-C is pressed.

    Raises:
        RequestError: the prompt or the parameters are invalid, or there is no tokenizer.
        HalyardError: the answer failed.
    """
    if tokenizer is None:
        raise RequestError("this checkpoint has no tokenizer: text can't be generated", "prompt")
    decoder = tokenizer.detokenizer
    request = engine.intake.request(prompt_token_ids, params)
    answers = Answers(request, lambda: decoder(params.skip_special_tokens))
    engine.add(request)
    try:
        while engine.has_work() and not answers.finished and not interrupt.pressed:
            events = engine.step()
            delta = answers.feed(events) if events else None
            for new in delta.completions if delta is not None else ():
                if new.error is not None:
                    raise HalyardError(new.error)
                yield new
    finally:
        engine.abort(request.request_id)  # nothing to give up if it has ended
