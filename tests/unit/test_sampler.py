"""The sampler against brute force: which tokens are allowed, how often they come, what they score."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from plain_drawing import PlainDrawing

from halyard.runtime.batcher import Arena, stage
from halyard.runtime.drawing import uniform
from halyard.runtime.masks import Allowed
from halyard.runtime.plan import PlanRow
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.sampler import Draw, Sampler
from halyard.runtime.samples import SampleRow, Samples
from halyard.runtime.scores import score
from halyard.runtime.sequence import Sequence


@pytest.fixture(autouse=True, params=["torch", "kernels"])
def sorts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test holds whether torch draws, which sorts what filters leave, or a device's kernels do."""
    if request.param == "kernels":
        own = partial(Sampler, kernels=PlainDrawing())
        monkeypatch.setattr(sys.modules[__name__], "Sampler", own)

        def in_one_piece(arrays: Any, device: torch.device) -> list[torch.Tensor]:
            """As they come to a GPU."""
            return stage(arrays, device, Arena(torch.empty(1 << 20, dtype=torch.uint8)))

        monkeypatch.setattr("halyard.runtime.sampler.stage", in_one_piece)
    return bool(request.param == "torch")


def changed(sampler: Sampler, logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Logits that are drawn from."""
    if sampler._changing is None:
        return sampler._changed(logits, draw)
    return sampler._changed_there(logits, draw, draw.changed, None)[0]


VOCAB = 700  # more than the sampler looks at before it sorts everything


def sample_row(
    logits_row: int = 0,
    answer: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (5, 6),
    seed: int = 0,
    answer_index: int = 0,
    eos: frozenset[int] = frozenset(),
    **params: Any,
) -> SampleRow:
    own = SamplingParams(max_tokens=100, **params)
    request = Request(
        "r", prompt, own, 100, eos, seed=seed, stop_token_ids=frozenset(own.stop_token_ids or ())
    )
    sequence = Sequence(0, request, 0, [*prompt, *answer], len(prompt))
    return SampleRow(PlanRow(sequence, 0, len(sequence.token_ids), 1), answer_index, logits_row)


def logits_of(rows: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def kept_probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """What is left of the distribution [vocab], one token at a time."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    order = order[:top_k] if top_k > 0 else order
    total, before = probabilities[order].sum(), 0.0
    kept = np.zeros_like(probabilities)
    for token in order:
        if before >= top_p * total:
            break
        if probabilities[token] >= min_p * probabilities[order[0]]:
            kept[token] = probabilities[token]
        before += probabilities[token]
    return kept / kept.sum()


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0, "top_p": 0.95},  # kept tokens reach beyond the first candidates
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 600},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 400, "top_p": 0.99, "min_p": 0.001},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    """Every drawn token is allowed, and the counts pass a chi-square test (seeds are fixed)."""
    logits = logits_of(1, seed=3)
    own = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    expected = kept_probabilities(logits[0].numpy(), **own)
    draws = 4000
    rows = [sample_row(seed=seed, **filters) for seed in range(draws)]
    tokens = Sampler(VOCAB).sample(logits, rows).token_ids.numpy()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    observed, wanted = observed[wanted > 1e-6], wanted[wanted > 1e-6]
    if len(wanted) > 1:
        chi_square = ((observed - wanted) ** 2 / wanted).sum()
        freedom = len(wanted) - 1
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_all_allowed_tokens_and_no_others_can_come(
    filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sorts: bool
) -> None:
    """Sweep the random number over the middle of every kept token's share."""
    logits = logits_of(1, seed=4)
    own = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    expected = kept_probabilities(logits[0].numpy(), **own)
    order = np.argsort(-expected, kind="stable")
    if not (sorts and {"top_k", "top_p", "min_p"} & filters.keys()):
        order = np.arange(VOCAB)  # else in the order of the vocabulary
    middles = np.cumsum(expected[order]) - expected[order] / 2
    # Weights are fp32: smaller shares may be missed by a number that is not.
    reachable = expected[order] > 1e-6
    order, middles = order[reachable], middles[reachable]
    monkeypatch.setattr("halyard.runtime.sampler.uniform", lambda samples: middles[: len(samples)])
    rows = [sample_row(**filters) for _ in order]
    assert Sampler(VOCAB).sample(logits, rows).token_ids.tolist() == order.tolist()


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_random_range(
    number: float, monkeypatch: pytest.MonkeyPatch, sorts: bool
) -> None:
    logits = logits_of(1, seed=5)
    monkeypatch.setattr(
        "halyard.runtime.sampler.uniform",
        lambda samples: np.full(len(samples), number),
    )
    token = Sampler(VOCAB).sample(logits, [sample_row(top_k=9)]).token_ids.item()
    kept = logits[0].topk(9).indices
    assert token == (kept if sorts else kept.sort().values)[0 if number == 0 else 8]


def test_greedy_in_every_dtype_and_forks_of_a_row() -> None:
    logits = logits_of(3, seed=6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = [sample_row(i, temperature=0) for i in (0, 1, 1, 2)]
        tokens = Sampler(VOCAB).sample(logits.to(dtype), rows).token_ids
        assert tokens.tolist() == logits.to(dtype).argmax(-1)[[0, 1, 1, 2]].tolist()


def test_what_a_request_draws_does_not_depend_on_its_batch() -> None:
    logits = logits_of(4, seed=7)
    rows = [
        sample_row(0, seed=11, top_p=0.9),
        sample_row(1, temperature=0),
        sample_row(2, seed=12, temperature=2.0, answer=(1, 2)),
        sample_row(3, seed=13, presence_penalty=1.0, answer=(3,), logprobs=2),
    ]
    together = Sampler(VOCAB).sample(logits, rows).token_ids.tolist()
    alone = []
    for i, row in enumerate(rows):
        single = SampleRow(row.row, row.answer_index, 0)
        alone.append(Sampler(VOCAB).sample(logits[i : i + 1], [single]).token_ids.item())
    assert together == alone


def test_numbers_differ_by_seed_answer_and_position_and_are_even() -> None:
    same = [sample_row(seed=2**64 - 1, answer=(1,)), sample_row(seed=2**64 - 1, answer=(9,))]
    first, second = uniform(Samples.of(same, 2))
    assert first == second  # the token's value plays no part
    rows = [
        sample_row(seed=seed, answer_index=index, answer=(0,) * length)
        for seed in range(20)
        for index in range(10)
        for length in range(50)
    ]
    numbers = uniform(Samples.of(rows, len(rows)))
    assert len(set(numbers.tolist())) == len(rows)
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert ((counts - 100) ** 2 / 100).sum() < 99 + 4 * np.sqrt(2 * 99)
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 0.04


def test_penalties_against_brute_force() -> None:
    logits = logits_of(1, seed=8)
    prompt, answer = (1, 2, 2), (3, 3, 4)
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.5}
    expected = logits[0].clone()
    for token in {*prompt, *answer}:
        expected[token] *= 1.5 if expected[token] < 0 else 1 / 1.5
    for token in answer:
        expected[token] -= 0.4
    for token in set(answer):
        expected[token] -= 0.7
    row = sample_row(prompt=prompt, answer=answer, **penalties)
    sampler = Sampler(VOCAB)
    for length in (1, 2, 3):  # the counts are kept from step to step
        part = sample_row(prompt=prompt, answer=answer[:length], **penalties)
        part.row.sequence.token_ids.extend(answer[length:])
        step = SampleRow(PlanRow(row.row.sequence, len(prompt) + length - 1, 1, 1), 0, 0)
        draw = sampler.prepare(Samples.of([step], 1))
        counted = changed(sampler, logits, draw)[0]
        fresh = Sampler(VOCAB)
        anew = changed(fresh, logits, fresh.prepare(Samples.of([step], 1)))[0]
        assert torch.equal(counted, anew)
    assert torch.allclose(counted, expected, atol=1e-6)


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 8], logits[0, 7] = 3.0, 2.0, 1.0
    before = logits.clone()

    def greedy(**options: Any) -> Any:
        return (
            Sampler(VOCAB).sample(logits, [sample_row(temperature=0, **options)]).token_ids.item()
        )

    ends = {"eos": frozenset({9}), "stop_token_ids": [8], "min_tokens": 2}
    assert greedy(logit_bias={5: 50.0}) == 5
    assert greedy(logit_bias={9: -100.0}) == 8
    assert greedy(**ends) == 7
    assert greedy(**ends, answer=(0,)) == 7
    assert greedy(**ends, answer=(0, 0)) == 9
    assert torch.equal(logits, before)


@pytest.mark.parametrize("huge", [2**63 - 1, 2**63, 2**70])
def test_integers_of_any_size_are_sampled_with(huge: int) -> None:
    """JSON's integers have no bound: one that 64 bits don't hold must not be the engine's end."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 8] = 3.0, 2.0
    own = SamplingParams(
        temperature=0, top_k=huge, top_p=0.9, max_tokens=None, min_tokens=huge, logit_bias={3: 1.0}
    )
    request = Request("r", (5, 6), own, 100, frozenset({9}))
    row = SampleRow(PlanRow(Sequence(0, request, 0, [5, 6], 2), 0, 2, 1), 0, 0)
    assert Sampler(VOCAB).sample(logits, [row]).token_ids.item() == 8


def test_ignored_eos_is_not_forbidden_by_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 3.0
    row = sample_row(temperature=0, min_tokens=2, ignore_eos=True, eos=frozenset({9}))
    assert Sampler(VOCAB).sample(logits, [row]).token_ids.item() == 9


def test_logprobs_come_from_the_model_not_from_the_filters() -> None:
    logits = logits_of(2, seed=9)
    own = logits.log_softmax(-1)
    rows = [
        sample_row(0, logprobs=3, temperature=0.5, top_k=5, presence_penalty=2.0, answer=(1,)),
        sample_row(1, temperature=0),
    ]
    sampled = Sampler(VOCAB).sample(logits, rows)
    assert sampled.scored.tolist() == [0]
    assert sampled.scores is not None
    (scored,) = sampled.scores.listed([3])
    assert scored is not None
    assert scored.token_id == sampled.token_ids[0]
    assert scored.logprob == pytest.approx(own[0, scored.token_id].item(), abs=1e-5)
    assert scored.rank == int((own[0] > own[0, scored.token_id]).sum()) + 1
    assert [token for token, _ in scored.top] == own[0].topk(3).indices.tolist()


def test_prompt_scores_are_the_same_in_pieces() -> None:
    logits = logits_of(300, seed=10)  # more rows than are scored at a time
    targets = torch.arange(300) % VOCAB
    scored = score(logits, targets, 2).listed([2] * 300)
    own = logits.log_softmax(-1)
    assert len(scored) == 300
    for i in (0, 255, 256, 299):
        assert scored[i].logprob == pytest.approx(own[i, targets[i]].item(), abs=1e-5)
        assert len(scored[i].top) == 2


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("vocab", [1, 300, 12_800, 12_999])
def test_the_most_likely_are_found_wherever_they_are(vocab: int, count: int) -> None:
    values = torch.randn(6, vocab, generator=torch.Generator().manual_seed(12))
    values[1, :200], values[2, -3:], values[3] = 9.0, 9.0, float("-inf")
    token = torch.zeros(6, dtype=torch.int64)
    found = score(values, token, count)
    own = values.log_softmax(-1)
    wanted = own.topk(min(count, vocab)).values
    torch.testing.assert_close(found.best, wanted, equal_nan=True, atol=0, rtol=0)
    again = own.gather(1, found.best_ids)
    torch.testing.assert_close(found.best, again, equal_nan=True, atol=0, rtol=0)
    assert all(len(set(ids)) == len(ids) for ids in found.best_ids.tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_mark_their_row_and_no_other(value: float, temperature: float) -> None:
    logits = logits_of(3, seed=11)
    good = Sampler(VOCAB).sample(logits, [sample_row(i, temperature=temperature) for i in range(3)])
    logits[1, 17] = value
    sampled = Sampler(VOCAB).sample(
        logits, [sample_row(i, temperature=temperature) for i in range(3)]
    )
    assert sampled.bad.tolist() == [False, True, False]
    assert sampled.token_ids[[0, 2]].tolist() == good.token_ids[[0, 2]].tolist()


def test_very_small_temperature_is_greedy_and_finite() -> None:
    logits = logits_of(1, seed=12, scale=50.0)
    tokens = Sampler(VOCAB).sample(logits, [sample_row(temperature=1e-6)]).token_ids
    assert tokens.tolist() == logits.argmax(-1).tolist()


class Grammar:
    """Allows the same tokens at every place."""

    def __init__(self, *allowed: int) -> None:
        tokens = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
        tokens[list(allowed)] = 1
        self.packed = np.packbits(tokens, bitorder="little")
        self.maker = self

    def begin(self, rows: Any) -> Future[Allowed]:
        made: Future[Allowed] = Future()
        packed = np.stack([row.guidance.packed for row in rows])
        made.set_result(Allowed([row.position for row in rows], packed, {}))
        return made


def held(grammar: Grammar, row: SampleRow) -> SampleRow:
    sequence = row.row.sequence
    sequence.request = replace(sequence.request, guidance=grammar)  # type: ignore[arg-type]
    return row


@pytest.mark.parametrize("free", [0, 2])
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 9}, {"logit_bias": {8: 50}}])
def test_only_what_a_grammar_allows_is_drawn(free: int, params: dict[str, Any]) -> None:
    """For some rows or for all, and the free ones draw what they would draw alone."""
    logits = logits_of(40 + free, seed=13)
    kept = logits.clone()
    grammar, sampler = Grammar(7, 300, VOCAB - 1), Sampler(VOCAB)
    alone = [sample_row(n, seed=n, **params) for n in range(free)]
    rows = [held(grammar, sample_row(n, seed=n, **params)) for n in range(free, 40 + free)]
    drawn = sampler.sample(logits, [*alone, *rows]).token_ids.tolist()
    assert set(drawn[free:]) == {7, 300, VOCAB - 1}
    assert drawn[:free] == sampler.sample(logits[:free], alone).token_ids.tolist()
    assert torch.equal(logits, kept)


def test_bad_logits_of_a_guided_row_are_told() -> None:
    for token in (7, 8):  # allowed and not
        logits = logits_of(2, seed=14)
        logits[1, token] = float("nan")
        rows = [held(Grammar(7), sample_row(n)) for n in range(2)]
        assert Sampler(VOCAB).sample(logits, rows).bad.tolist() == [False, True]


def test_a_grammar_that_only_allows_the_end_wins_over_min_tokens() -> None:
    rows = [held(Grammar(3), sample_row(n, eos=frozenset({3}), min_tokens=9)) for n in range(2)]
    rows.append(held(Grammar(3, 699), sample_row(2, eos=frozenset({3}), min_tokens=9)))
    assert Sampler(VOCAB).sample(logits_of(3), rows).token_ids.tolist() == [3, 3, 699]


def test_weights_too_small_for_fp32_never_come() -> None:
    logits = torch.full((64, VOCAB), -95.0)
    logits[:, 5] = logits[:, 6] = 0.0
    drawn = Sampler(VOCAB).sample(logits, [sample_row(n, seed=n) for n in range(64)])
    assert set(drawn.token_ids.tolist()) == {5, 6}


def test_only_rows_that_are_changed_are_copied() -> None:
    kernels = PlainDrawing()
    logits = logits_of(9, seed=15)
    rows = [sample_row(n, seed=n) for n in range(9)]
    rows[3] = sample_row(3, seed=3, repetition_penalty=1.3)
    rows[5] = held(Grammar(7, 300), sample_row(5, temperature=0))
    rows[6] = sample_row(6, temperature=0, min_tokens=4, eos=frozenset({1}))
    rows[7] = sample_row(6, temperature=0, logit_bias={9: 99.0})
    drawn = Sampler(VOCAB, kernels=kernels).sample(logits, rows).token_ids.tolist()
    assert kernels.changed == 4
    assert drawn == Sampler(VOCAB, kernels=None).sample(logits, rows).token_ids.tolist()
    assert drawn[7] == 9
