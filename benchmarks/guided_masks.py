"""What a grammar costs a decode step: 16 sequences, with and without a JSON schema.

PYTHONPATH=pkg python benchmarks/guided_masks.py [--backend cpu] [--shape 160m --vocabulary 131072]

Without --shape the embedded model (a vocabulary of 4,096) is run. With it, random weights of that
shape and a vocabulary made of the pieces of words in Python's standard library, most frequent first.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sysconfig
import time
from collections import Counter
from pathlib import Path

from halyard.models.shapes import shape_config
from halyard.runtime.guided import GrammarCompiler
from halyard.runtime.llm import LLM
from halyard.runtime.request import Constraint, SamplingParams

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    },
    "minItems": 30,
}
SEQUENCES, STEPS = 16, 96
END = 0


class Pieces:
    """A vocabulary of byte strings, as real ones are: words with their spaces, and all bytes."""

    serialised = None
    bos_token_id = None
    special_ids = frozenset({END})

    def __init__(self, size: int) -> None:
        counts: Counter[str] = Counter()
        for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if len(counts) > 40 * size:
                break
            words = Counter(re.findall(r" ?\w+|\s+|[^\w\s]+", file.read_text(errors="ignore")))
            for word, count in words.items():
                for end in range(2, min(len(word), 12) + 1):
                    counts[word[:end]] += count
        best = [piece.encode() for piece, _ in counts.most_common(size)]
        self.tokens = [b"<end>", *(bytes([byte]) for byte in range(256)), *best][:size]
        if len(self.tokens) < size:
            raise SystemExit(f"only {len(self.tokens)} pieces found")
        self.vocab_size = size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


def step_seconds(llm: LLM, params: SamplingParams) -> float:
    """Median duration of a decode step."""
    for number in range(SEQUENCES):
        llm.engine.add(llm.engine.intake.request([5 + number, 6, 7], params))
    times = []
    while llm.engine.has_work():
        started = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def load(options: argparse.Namespace) -> LLM:
    common = {"backend": options.backend, "kv_blocks": 512, "host_kv_blocks": 0}
    if options.shape is None:
        return LLM("embedded", **common)
    config = shape_config(options.shape)
    config.vocab_size = options.vocabulary
    llm = LLM(config, load_format="dummy", max_model_len=512, **common)
    pieces = Pieces(options.vocabulary)
    # A model without a checkpoint has no tokenizer: this one is put beside it.
    llm.engine.intake._grammars = GrammarCompiler(
        lambda: pieces, options.vocabulary, frozenset({END})
    )
    return llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--shape")
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    common = {"max_tokens": STEPS, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    free = SamplingParams(**common)
    held = SamplingParams(**common, guided=Constraint.json_schema(SCHEMA))
    with load(options) as llm:
        step_seconds(llm, held)
        rounds = [(step_seconds(llm, free), step_seconds(llm, held)) for _ in range(options.rounds)]
    plain = statistics.median(one for one, _ in rounds)
    guided = statistics.median(other for _, other in rounds)
    low, middle, high = statistics.quantiles((other / one - 1 for one, other in rounds), n=4)
    print(f"{options.shape or 'embedded'}, {SEQUENCES} sequences on {options.backend}: "
          f"{plain * 1e3:.2f} ms a step, {guided * 1e3:.2f} ms with masks; of {options.rounds} rounds "
          f"in turns {middle:+.1%} (quartiles {low:+.1%} to {high:+.1%})")  # fmt: skip


if __name__ == "__main__":
    main()
