"""Built-in workloads are what the comparison ran; files are checked line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halyard.hal.errors import ConfigError
from halyard.runtime.workloads import WORKLOADS, load_workload

VOCAB = 1000


@pytest.mark.parametrize(
    ("name", "size", "count", "prompt", "answer"),
    [
        ("decode", "gpu", 256, 128, 512),
        ("decode", "cpu", 16, 128, 64),
        ("prefill", "gpu", 64, 4000, 8),
        ("prefill", "cpu", 4, 1024, 4),
        ("prefix", "gpu", 256, 2048 + 64, 64),
        ("prefix", "cpu", 16, 512 + 32, 16),
        ("single", "gpu", 1, 128, 256),
        ("single", "cpu", 1, 128, 64),
    ],
)
def test_fixed_shapes(name: str, size: str, count: int, prompt: int, answer: int) -> None:
    requests = load_workload(name, VOCAB, size).requests
    assert len(requests) == count
    assert {(len(one.prompt_token_ids), one.max_tokens) for one in requests} == {(prompt, answer)}


def test_mixed_has_the_totals_of_the_comparison() -> None:
    small, big = load_workload("mixed", VOCAB, "cpu"), load_workload("mixed", VOCAB, "gpu")
    assert (len(small.requests), small.prompt_tokens, small.answer_tokens) == (32, 8693, 7928)
    assert len(big.requests) == 1000
    assert big.requests[:32] == small.requests
    for one in big.requests:
        assert 4 <= len(one.prompt_token_ids) <= 1024
        assert 4 <= one.max_tokens <= 1024


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_deterministic_and_within_the_vocabulary(name: str) -> None:
    first, second = load_workload(name, VOCAB, "cpu"), load_workload(name, VOCAB, "cpu")
    assert first == second
    tokens = {token for one in first.requests for token in one.prompt_token_ids}
    assert min(tokens) >= 0
    assert max(tokens) < VOCAB
    assert len(tokens) > 50


def test_prefix_shares_the_start_and_nothing_more() -> None:
    prompts = [one.prompt_token_ids for one in load_workload("prefix", VOCAB, "cpu").requests]
    assert len({prompt[:512] for prompt in prompts}) == 1
    assert len({prompt[512:] for prompt in prompts}) == len(prompts)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"prompt_token_ids": [1, 2], "max_tokens": 3},
        {"prompt_token_ids": [9], "max_tokens": 1},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    workload = load_workload(str(path), VOCAB)
    assert workload.name == "own"
    assert (workload.prompt_tokens, workload.answer_tokens, workload.longest) == (3, 4, 5)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "prompt_token_ids"),
        ('{"prompt_token_ids": [], "max_tokens": 1}', "at least one integer"),
        ('{"prompt_token_ids": [true], "max_tokens": 1}', "at least one integer"),
        ('{"prompt_token_ids": [1], "max_tokens": 0}', "max_tokens"),
        ('{"prompt_token_ids": [1]}', "max_tokens"),
        ('{"prompt_token_ids": [1000], "max_tokens": 1}', "token 1000 is outside"),
        ('{"prompt_token_ids": [-1], "max_tokens": 1}', "token -1 is outside"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt_token_ids": [1], "max_tokens": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_workload(str(path), VOCAB)
    assert f"{path}:2:" in str(caught.value)


def test_other_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixed, decode"):
        load_workload("nonsense", VOCAB)
    with pytest.raises(ConfigError, match="gpu or cpu"):
        load_workload("mixed", VOCAB, "tpu")  # type: ignore[arg-type]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ConfigError, match="no requests"):
        load_workload(str(empty), VOCAB)
