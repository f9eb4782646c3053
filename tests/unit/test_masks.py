"""Masks that begin as soon as tokens are known are those that are made anew, whoever comes or goes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="structured output needs llguidance")

import torch

from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native.kernels import NativeKernels
from halyard.models.source import resolve_source
from halyard.models.tokenizer import load_tokenizer
from halyard.runtime.guided import GrammarCompiler
from halyard.runtime.masks import TOO_COMPLEX, Guidance, MaskRow
from halyard.runtime.request import Constraint

SCHEMA = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}}},
    "maxItems": 2,
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = load_tokenizer(resolve_source("embedded"))
    assert tokenizer is not None
    return GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, frozenset({END}))


END = 0


def rows_of(held: list[tuple[Guidance, list[int]]]) -> list[MaskRow]:
    return [
        MaskRow(position, guidance, 0, [9, 9, *answer], 2)
        for position, (guidance, answer) in enumerate(held)
    ]


def tokens(bits: Any) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
    return found


def test_masks_that_follow_are_those_made_anew(compiler: GrammarCompiler) -> None:
    """Answers draw, wait for a few steps, begin anew with fewer tokens, and others join."""
    rng = random.Random(5)
    constraint = Constraint.json_schema(SCHEMA)
    maker = compiler.guidance(constraint).maker
    held: list[tuple[Guidance, list[int]]] = []
    for step in range(60):
        if len(held) < 6 and rng.random() < 0.5:
            held.insert(rng.randrange(len(held) + 1), (compiler.guidance(constraint), []))
        present = [one for one in held if rng.random() < 0.9]
        if not present:
            continue
        masks = maker.begin(rows_of(present))
        found = masks.result()
        fresh = [(compiler.guidance(constraint), answer) for _, answer in present]
        anew = maker.begin(rows_of(fresh)).result()
        assert found.bits.tolist() == anew.bits.tolist(), step
        assert not found.failures
        drawn = [rng.choice(tokens(bits)) for bits in found.bits]
        masks.follow(drawn)
        for (_, answer), token in zip(present, drawn, strict=True):
            answer.append(token)
            if rng.random() < 0.05:
                answer.clear()  # it starts anew
        held = [(guidance, answer) for guidance, answer in held if END not in answer]


def test_an_answer_that_is_complete_may_only_end(compiler: GrammarCompiler) -> None:
    guidance = compiler.guidance(Constraint.regex("a"))
    maker = guidance.maker
    masks = maker.begin(rows_of([(guidance, [])]))
    (token,) = tokens(masks.result().bits[0])
    masks.follow([token])
    assert tokens(maker.begin(rows_of([(guidance, [token])])).result().bits[0]) == [END]


def test_a_complete_answer_that_goes_on_may_take_any_end(compiler: GrammarCompiler) -> None:
    """With ignore_eos: an end that the library doesn't know as one breaks nothing."""
    other = 5
    two = GrammarCompiler(compiler._vocabulary, compiler.vocab_size, frozenset({END, other}))
    guidance = two.guidance(Constraint.regex("a"))
    answer: list[int] = []
    (token,) = tokens(guidance.maker.begin(rows_of([(guidance, answer)])).result().bits[0])
    for drawn in (token, other, END, other):
        masks = guidance.maker.begin(rows_of([(guidance, answer)]))
        found = masks.result()
        assert not found.failures
        if answer:
            assert tokens(found.bits[0]) == [END, other]
        masks.follow([drawn])
        answer.append(drawn)


def test_a_grammar_that_breaks_down_fails_alone(compiler: GrammarCompiler) -> None:
    broken, sound = (compiler.guidance(Constraint.regex("[ab]{9}")) for _ in range(2))
    maker = sound.maker
    masks = maker.begin(rows_of([(broken, []), (sound, [])]))
    first = tokens(masks.result().bits[0])
    wrong = next(token for token in range(END + 1, compiler.vocab_size) if token not in first)
    masks.follow([wrong, first[0]])
    after = maker.begin(rows_of([(broken, [wrong]), (sound, first[:1])])).result()
    assert after.failures == {0: TOO_COMPLEX}
    assert set(tokens(after.bits[1])) <= set(first)
    assert len(tokens(after.bits[0])) >= compiler.vocab_size  # void, but something can be drawn


@pytest.mark.parametrize("isa", ["best", "portable"])
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 4096, 5003])
def test_kernels_bar_what_is_forbidden_where_it_lies(isa: str, vocab: int) -> None:
    device = CpuDevice()
    kernels = NativeKernels(device, None if isa == "best" else isa)
    rng = np.random.default_rng(vocab)
    words = -(-vocab // 32)
    allowed = rng.integers(0, 256, (3, words * 4), dtype=np.uint8)
    forbidden = np.unpackbits(allowed, axis=1, bitorder="little")[:, :vocab] == 0
    logits = torch.randn(5, vocab)
    logits[2, 0] = float("nan")
    for places in (None, [4, 2, 0]):
        whole = torch.cat([logits, torch.zeros(5, 3)], dim=1)
        work = whole[:, :vocab]
        kernels.bar(
            work, torch.from_numpy(allowed), None if places is None else torch.tensor(places)
        )
        wanted = logits.clone()
        for row, place in enumerate(places or range(3)):
            barred = torch.from_numpy(np.where(forbidden[row], -np.inf, 0).astype(np.float32))
            wanted[place] += barred
        assert torch.equal(work.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
        assert torch.equal(work.isnan(), wanted.isnan())
        assert not whole[:, vocab:].any()


LIST = {
    "$defs": {"node": {
        "type": "object",
        "properties": {"v": {"type": "string", "pattern": "^x+y{1,2}$"},
                       "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["v", "next"], "additionalProperties": False}},
    "$ref": "#/$defs/node",
}  # fmt: skip


@pytest.mark.parametrize("room", [60, 90, 200])
def test_an_answer_that_must_be_complete_is(compiler: GrammarCompiler, room: int) -> None:
    """Whatever is drawn before, its form ends with its last token at the latest."""
    rng = random.Random(room)
    guidance, spelled = (
        compiler.guidance(Constraint.json_schema(LIST)),
        compiler._vocabulary().token_bytes,
    )
    maker, answer = guidance.maker, list[int]()
    guidance.most = room
    while not answer or answer[-1] != END:
        assert len(answer) < room, "it was cut off"
        masks = maker.begin([MaskRow(0, guidance, 0, answer, 0)])
        allowed = tokens(masks.result().bits[0])
        going_on = [one for one in allowed if not spelled(one).startswith(b"n")]  # not null
        answer.append(rng.choice(going_on or allowed))
        masks.follow(answer[-1:])
    assert len(answer) > room // 3
    matcher = guidance.template.deep_copy()
    assert matcher.consume_tokens(answer)


def test_without_room_for_the_form_it_is_cut_off(compiler: GrammarCompiler) -> None:
    guidance = compiler.guidance(Constraint.json_schema(LIST))
    guidance.most = 3
    bits = guidance.maker.begin([MaskRow(0, guidance, 0, [], 0)]).result().bits
    fresh = compiler.guidance(Constraint.json_schema(LIST))
    assert bits.tolist() == fresh.maker.begin([MaskRow(0, fresh, 0, [], 0)]).result().bits.tolist()
