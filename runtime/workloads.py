"""Work for benchmarks: the built-in workloads in two sizes, and workloads from JSONL files. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from halyard.hal.errors import ConfigError

__all__ = ["WORKLOADS", "Workload", "WorkloadRequest", "WorkloadSize", "load_workload"]

WorkloadSize = Literal["gpu", "cpu"]

# The seed's first 32 requests hold 8,693 prompt and 7,928 answer tokens, within 0.03 % of the 8,695
# and 7,927 of the CPU comparison. RandomState's stream is frozen: numpy's releases don't change it.
_LENGTH_SEED = 1479
_TOKEN_SEED = 0
_MIXED_REQUESTS = 1000


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One prompt and how many tokens answer it."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are submitted all at once, in this order."""

    name: str
    requests: tuple[WorkloadRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers if none ends early."""
        return sum(request.max_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer together."""
        return max(len(one.prompt_token_ids) + one.max_tokens for one in self.requests)


def load_workload(name_or_file: str, vocab_size: int, size: WorkloadSize = "gpu") -> Workload:
    """A built-in workload by name, or one from a JSONL file.

    Args:
        vocab_size: prompt tokens are below it.
        size: scale of a built-in workload; files have the size they have.

    Raises:
        ConfigError: no such workload, or a line of the file is wrong.
    """
    if name_or_file in WORKLOADS:
        if size not in get_args(WorkloadSize):
            raise ConfigError(f"workload size must be gpu or cpu, got {size!r}")
        if vocab_size < 1:
            raise ConfigError(f"a workload needs a vocabulary, got one of {vocab_size} tokens")
        return Workload(name_or_file, WORKLOADS[name_or_file](vocab_size, size))
    path = Path(name_or_file)
    if not path.is_file():
        known = ", ".join(WORKLOADS)
        raise ConfigError(f"no workload {name_or_file!r}: give one of {known}, or a JSONL file")
    return Workload(path.stem, _read_jsonl(path, vocab_size))


def _mixed(vocab_size: int, size: WorkloadSize) -> tuple[WorkloadRequest, ...]:
    """Lengths as in conversations: log-normal, many short ones and a long tail."""
    lengths = np.random.RandomState(_LENGTH_SEED)
    shapes = []
    for _ in range(_MIXED_REQUESTS if size == "gpu" else 32):
        prompt, answer = lengths.lognormal(4.9, 1.0), lengths.lognormal(5.0, 0.9)
        shapes.append((_clipped(prompt), _clipped(answer)))
    return _random_prompts(shapes, vocab_size)


def _clipped(length: float) -> int:
    return int(np.clip(np.rint(length), 4, 1024))


def _decode(vocab_size: int, size: WorkloadSize) -> tuple[WorkloadRequest, ...]:
    shapes = [(128, 512)] * 256 if size == "gpu" else [(128, 64)] * 16
    return _random_prompts(shapes, vocab_size)


def _prefill(vocab_size: int, size: WorkloadSize) -> tuple[WorkloadRequest, ...]:
    shapes = [(4000, 8)] * 64 if size == "gpu" else [(1024, 4)] * 4
    return _random_prompts(shapes, vocab_size)


def _prefix(vocab_size: int, size: WorkloadSize) -> tuple[WorkloadRequest, ...]:
    """Requests that share the first part of their prompts."""
    count, shared, own, answer = (256, 2048, 64, 64) if size == "gpu" else (16, 512, 32, 16)
    start, *rest = _random_prompts([(shared, 1), *[(own, answer)] * count], vocab_size)
    return tuple(
        WorkloadRequest(start.prompt_token_ids + one.prompt_token_ids, answer) for one in rest
    )


def _single(vocab_size: int, size: WorkloadSize) -> tuple[WorkloadRequest, ...]:
    return _random_prompts([(128, 256 if size == "gpu" else 64)], vocab_size)


WORKLOADS: dict[str, Callable[[int, WorkloadSize], tuple[WorkloadRequest, ...]]] = {
    "mixed": _mixed,
    "decode": _decode,
    "prefill": _prefill,
    "prefix": _prefix,
    "single": _single,
}


def _random_prompts(shapes: list[tuple[int, int]], vocab_size: int) -> tuple[WorkloadRequest, ...]:
    """Requests of (prompt length, answer length), their tokens drawn from the whole vocabulary."""
    tokens = np.random.RandomState(_TOKEN_SEED)
    return tuple(
        WorkloadRequest(tuple(tokens.randint(0, vocab_size, prompt).tolist()), answer)
        for prompt, answer in shapes
    )


def _read_jsonl(path: Path, vocab_size: int) -> tuple[WorkloadRequest, ...]:
    requests = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    requests.append(_parse_line(line, f"{path}:{number}", vocab_size))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    if not requests:
        raise ConfigError(f"{path} holds no requests")
    return tuple(requests)


def _parse_line(line: str, place: str, vocab_size: int) -> WorkloadRequest:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON: {error}") from error
    if not isinstance(item, dict):
        raise ConfigError(f'{place}: want {{"prompt_token_ids": [...], "max_tokens": n}}')
    prompt, max_tokens = item.get("prompt_token_ids"), item.get("max_tokens")
    if not isinstance(prompt, list) or not prompt or not all(type(one) is int for one in prompt):
        raise ConfigError(f"{place}: prompt_token_ids must be a list of at least one integer")
    if type(max_tokens) is not int or max_tokens < 1:
        raise ConfigError(f"{place}: max_tokens must be an integer of at least 1")
    outside = [one for one in prompt if not 0 <= one < vocab_size]
    if outside:
        raise ConfigError(
            f"{place}: token {outside[0]} is outside the vocabulary of {vocab_size} tokens"
        )
    return WorkloadRequest(tuple(prompt), max_tokens)
