"""`halyard chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from halyard.api.cli import options
from halyard.api.cli.generate import add_sampling_arguments, sampling_params
from halyard.hal.errors import RequestError
from halyard.runtime.request import SamplingParams

if TYPE_CHECKING:
    from halyard.models.tokenizer import Tokenizer
    from halyard.runtime.engine import Engine

__all__ = ["Chat", "add_arguments", "run"]

HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C interrupts an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="embedded", help="folder or Hugging Face id (default: embedded)"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    add_sampling_arguments(parser, max_tokens=512)
    options.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    config = options.engine_config(args)
    from halyard.runtime.build import build_engine

    print("Loading ...", file=sys.stderr)
    built = build_engine(config)
    try:
        if built.tokenizer is None or not built.tokenizer.has_chat_template:
            raise RequestError("this model has no chat template: use `halyard generate`", "model")
        print(f"{built.plan.spec.name} on {built.plan.selection.row.name}. {HELP}.\n")
        Chat(built.engine, built.tokenizer, params, args.system).loop()
    finally:
        built.engine.close()
    return 0


class Chat:
    """The conversation so far and the loop around it."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, params: SamplingParams, system: str | None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.params = params
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)

    def loop(self) -> None:
        """Read lines and answer them until /exit or the end of the input."""
        with contextlib.suppress(ImportError):  # some Pythons lack it; input() works without
            import readline  # noqa: F401  # gives input() a history
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print(f"\n({HELP})")
                continue
            if line in ("/exit", "/quit"):
                return
            if line == "/clear":
                self.messages = list(self._start)
                print("(forgotten)")
            elif line.startswith("/"):
                print(f"({HELP})")
            elif line:
                self.answer(line)

    def answer(self, text: str) -> None:
        """Answer one message; on an error the conversation stays as it was."""
        from halyard.api.cli.local_stream import Interrupt, stream_answer

        messages = [*self.messages, {"role": "user", "content": text}]
        reply, reason = "", None
        with Interrupt() as interrupt:
            try:
                ids = self.tokenizer.apply_chat_template(messages)
                for new in stream_answer(self.engine, self.tokenizer, ids, self.params, interrupt):
                    reply += new.text
                    reason = new.finish_reason or reason
                    print(new.text, end="", flush=True)
            except RequestError as error:  # for instance: the conversation fills the context
                print(f"{error} (/clear starts anew)")
                return
        print()
        if interrupt.pressed:
            print("(interrupted)")
        elif reason == "length":
            print("(cut: the answer reached --max-tokens or the end of the context)")
        self.messages = [*messages, {"role": "assistant", "content": reply}]
