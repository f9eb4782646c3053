"""Counts of penalised sequences over many steps, against counting anew each time."""

from __future__ import annotations

import random
from collections import Counter

import torch

from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.sequence import Sequence, SequenceStatus
from halyard.runtime.token_counts import TokenCounts

VOCAB = 12


def sequence(number: int, prompt_len: int, rng: random.Random) -> Sequence:
    prompt = tuple(rng.randrange(VOCAB) for _ in range(prompt_len))
    return Sequence.first_of(Request(str(number), prompt, SamplingParams(), 100), number)


def test_counts_are_those_of_the_tokens_whatever_rows_come_and_wait() -> None:
    rng = random.Random(5)
    counts = TokenCounts(VOCAB)
    running: list[Sequence] = []
    fast = 0
    for step in range(400):
        if len(running) < 2 or rng.random() < 0.1:
            running.append(sequence(step, rng.randrange(1, 9), rng))
        if len(running) > 6:
            running.pop(rng.randrange(len(running))).status = SequenceStatus.FINISHED
        rows = running if rng.random() < 0.8 else rng.sample(running, rng.randrange(1, 3))
        if rng.random() < 0.1:
            rows = [*rows, rows[0]]  # it is to be forked
        waits = rng.random() < 0.5  # the step before is in flight: last tokens aren't known yet
        before = torch.tensor([rng.randrange(VOCAB) for _ in rows])
        pending = {id(s): n for n, s in enumerate(rows)} if waits else {}
        sources = [pending.get(id(s), -1) for s in rows]
        positions = [
            len(s.token_ids) + (source >= 0) for s, source in zip(rows, sources, strict=True)
        ]
        fast += list(rows) == counts._last
        update = counts.plan(list(rows), positions, sources)
        places = [torch.from_numpy(one) for one in counts.places(update)]
        seen, answered = counts.apply(update, places, before)
        for s in {id(s): s for s in rows}.values():  # what the step before sampled is told now
            if id(s) in pending:
                s.token_ids.append(int(before[pending[id(s)]]))
        for number, s in enumerate(rows):
            own = Counter(s.token_ids[s.num_prompt_tokens :])
            slot = int(update.slots[number])
            assert answered[slot].tolist() == [own[token] for token in range(VOCAB)]
            assert seen[slot].nonzero().flatten().tolist() == sorted(set(s.token_ids))
        for s in {id(s): s for s in rows}.values():
            s.token_ids.append(rng.randrange(VOCAB))
    assert fast > 100
