"""An engine that says what it is told to, behind the real client. Token ids are code points."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halyard.api.host import Loaded
from halyard.hal.errors import RequestError
from halyard.models.detokenizer import Detokenizer
from halyard.runtime.block_pool import BLANK, CACHED, USED
from halyard.runtime.client import Client
from halyard.runtime.engine import EngineStats
from halyard.runtime.intake import Intake, Limits
from halyard.runtime.kv_manager import KVCounters
from halyard.runtime.metrics import Metrics
from halyard.runtime.picture import EnginePicture, SequenceRow
from halyard.runtime.plan import TokenEvent, TokenLogprob
from halyard.runtime.port import EngineFacts
from halyard.runtime.request import Request
from halyard.runtime.stats import SchedulerStats
from halyard.runtime.thread_port import ThreadPort

EOS = 0


class LetterTokenizer:
    """One token a character; the chat template is `role: text` lines."""

    vocab_size = 0x10000
    eos_token_ids = (EOS,)
    bos_token_id = None
    has_chat_template = True
    special_ids = frozenset({EOS})
    serialised = None

    def __init__(self, chat_template: str = "letters") -> None:
        self.chat_template = chat_template
        self.options: dict[str, Any] = {}  # of the last conversation

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token) for token in token_ids if token != EOS)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        if not messages:
            raise RequestError("messages is empty: give at least one", "messages")
        self.options = options
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.encode(text + ("assistant: " if add_generation_prompt else ""))

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(lambda ids: self.decode(ids, skip_special_tokens))


class ScriptedEngine:
    """Answers every request with `script`, one character a step, then end-of-sequence.

    A `?` in the prompt's last five characters breaks the engine; `!` fails that request alone.
    """

    def __init__(
        self, script: str = "Hello, wörld!", *, max_queue_len: int | None = None, pause: float = 0.0
    ) -> None:
        self.script = script
        self.pause = pause  # seconds a step
        self.max_queue_len = max_queue_len
        self.num_waiting = 0
        self.intake = Intake(Limits(0x10000, 256, frozenset({EOS}), 8))
        self.metrics = Metrics("letters", "scripted")
        self.running: dict[str, tuple[Request, int]] = {}
        self.aborted: list[str] = []
        self.closed = False
        self.generated = 0

    def add(self, request: Request) -> None:
        self.running[request.request_id] = (request, 0)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        self.aborted.append(request_id)
        return self.running.pop(request_id, None) is not None

    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[TokenEvent]:
        time.sleep(self.pause)
        events: list[TokenEvent] = []
        for request_id, (request, done) in list(self.running.items()):
            tail = "".join(map(chr, request.prompt_token_ids[-20:]))
            if "?" in tail:
                raise RuntimeError("secret of the inside")
            if "!" in tail:
                events += [TokenEvent(request_id, i, finish_reason="error", error="logits are NaN")
                           for i in range(request.params.n)]  # fmt: skip
                del self.running[request_id]
                continue
            token = ord(self.script[done]) if done < len(self.script) else EOS
            last = done + 1 >= request.max_tokens
            finish = "stop" if token == EOS else "length" if last else None
            for index in range(request.params.n):
                self.generated += 1
                events.append(self._event(request, index, token, done, finish))
            if finish:
                del self.running[request_id]
            else:
                self.running[request_id] = (request, done + 1)
        return events

    def stats(self) -> EngineStats:
        scheduler = SchedulerStats(
            len(self.running), 0, 0, 100, len(self.running), 3, 0, 0, 0, 0.0, 0, 0, KVCounters()
        )
        return EngineStats(scheduler, 0, 0, self.generated, 0.0, 1.0)

    def picture(self) -> EnginePicture:
        rows = [
            SequenceRow(
                request_id,
                0,
                request.tenant,
                "decode" if done else "prefill",
                len(request.prompt_token_ids),
                0,
                done,
                done,
                request.max_tokens,
                1,
                request.arrival_time,
            )
            for request_id, (request, done) in self.running.items()
        ]
        used = len(rows)
        states = bytes([USED] * used + [CACHED] * 3 + [BLANK] * (97 - used))
        return EnginePicture(16, states, b"", used, 0, 0, tuple(rows))

    def check_integrity(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    @staticmethod
    def _event(request: Request, index: int, token: int, done: int, finish: Any) -> TokenEvent:
        params = request.params
        logprobs = prompt_logprobs = None
        if params.logprobs is not None:
            logprobs = (_logprob(token, params.logprobs),)
        if params.prompt_logprobs is not None and done == 0 and index == 0:
            count = params.prompt_logprobs
            prompt_logprobs = tuple(_logprob(t, count) for t in request.prompt_token_ids[1:])
        return TokenEvent(
            request.request_id,
            index,
            (token,),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            num_cached_tokens=2 if done == 0 else 0,
        )


def _logprob(token: int, count: int) -> TokenLogprob:
    top = tuple((token + rank, -0.5 - rank) for rank in range(count))
    return TokenLogprob(token, -0.5, 1, top)


class BlockedLoader:
    """Loads once it is let go on; `error`: fails with it instead."""

    def __init__(self, engine: ScriptedEngine, error: Exception | None = None) -> None:
        self.engine = engine
        self.error = error
        self.go_on = threading.Event()
        self.calls = 0

    def __call__(self, tell: Callable[[str], None]) -> Loaded:
        self.calls += 1
        tell("compiling")
        assert self.go_on.wait(20)
        if self.error is not None:
            raise self.error
        self.engine.running.clear()  # a new engine has nothing of the one before
        return Loaded(scripted_client(self.engine), "thin air", "float32")


def scripted_client(engine: ScriptedEngine, tokenizer: Any = None) -> Client:
    """The real client around it."""
    facts = EngineFacts("letters", "scripted", engine.intake.limits, engine.max_queue_len)
    return Client(ThreadPort(engine, facts), tokenizer or LetterTokenizer())  # type: ignore[arg-type]
