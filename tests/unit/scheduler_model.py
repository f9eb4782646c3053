"""A simulated device and model: what each KV slot holds is known, so wrong moves are seen.

A slot holds the token history up to its token (as a running hash). The "model" answers with a hash
of the history it really sees through the block table, so any stale, lost or swapped block changes
the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from halyard.runtime.config import SchedulerConfig
from halyard.runtime.plan import StepOutput, StepPlan, TokenEvent, TokenLogprob
from halyard.runtime.request import POOLINGS, Request, SamplingParams
from halyard.runtime.scheduler import Scheduler

VOCABULARY = 50
EOS = 0


def history(previous: int, token: int) -> int:
    return hash((previous, token))


class IssuedStep(NamedTuple):
    """A plan with copies of what was known when it was made."""

    plan: StepPlan
    blocks: list[list[int]]
    tokens: list[list[int]]


def position_sum(positions: range) -> np.ndarray:
    """What pooling tokens at these positions gives: their number, and their places added up."""
    return np.array([len(positions), sum(positions)], np.float32)


class SimulatedDevice:
    """Executes plans on dictionaries instead of tensors, in the order the contract states."""

    def __init__(self, scheduler: Scheduler) -> None:
        config = scheduler.config
        self.size = config.block_size
        self.device: list[list[int | None]] = [[None] * self.size for _ in range(config.num_blocks)]
        self.host: list[list[int | None]] = [
            [None] * self.size for _ in range(config.num_host_blocks)
        ]
        self.sampled: list[int] = []  # by the last step that ran

    def run(self, plan: StepPlan) -> StepOutput:
        return self.execute(self.issue(plan))

    def issue(self, plan: StepPlan) -> IssuedStep:
        """What the device is told when a step is planned; it may run much later."""
        return IssuedStep(
            plan,
            [list(row.sequence.block_ids) for row in plan.rows],
            [list(row.sequence.token_ids) for row in plan.rows],
        )

    def execute(self, step: IssuedStep) -> StepOutput:
        self.move(step.plan)
        return self._compute(step)

    def move(self, plan: StepPlan) -> None:
        """The block moves of a step, before its rows."""
        targets = [move.target for move in plan.swap_in] + [move.target for move in plan.copies]
        assert len(set(targets)) == len(targets), "a device block is written twice"
        assert len({m.target for m in plan.swap_out}) == len(plan.swap_out), "host block twice"
        assert not {m.source for m in plan.copies} & {m.target for m in plan.copies}
        for move in plan.swap_out:
            self.host[move.target] = list(self.device[move.source])
        for move in plan.swap_in:
            self.device[move.target] = list(self.host[move.source])
        for move in plan.copies:
            self.device[move.target] = list(self.device[move.source])

    def _compute(self, step: IssuedStep) -> StepOutput:
        plan = step.plan
        written: set[tuple[int, int]] = set()
        for row, blocks, known in zip(plan.rows, step.blocks, step.tokens, strict=True):
            if row.source >= 0:
                assert len(known) == row.start, "only the last token may be unknown"
                known.append(self.sampled[row.source])
            for position in range(row.start, row.end):
                slot = (blocks[position // self.size], position % self.size)
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                before = self._read(blocks, position - 1) if position else 0
                assert before is not None, "the slot before was never written"
                self.device[slot[0]][slot[1]] = history(before, known[position])
        tokens: list[tuple[int, ...]] = []
        pooled: dict[int, np.ndarray] = {}
        prompt_logprobs: list[tuple[TokenLogprob, ...] | None] = []
        for number, (row, blocks, known) in enumerate(
            zip(plan.rows, step.blocks, step.tokens, strict=True)
        ):
            pooling = row.sequence.request.pooling
            if pooling == "mean":
                pooled[number] = position_sum(range(row.start, row.end))
            elif pooling == "last" and row.num_samples:
                pooled[number] = position_sum(range(row.end - 1, row.end))
            seen = self._check(blocks, known[: row.end])
            first = row.sequence.index
            tokens.append(
                tuple(hash((seen, first + i)) % VOCABULARY for i in range(row.num_samples))
                if pooling is None
                else ()
            )
            asks = row.sequence.request.params.prompt_logprobs is not None
            last = min(row.end, row.sequence.num_prompt_tokens - 1)
            prompt_logprobs.append(
                tuple(TokenLogprob(known[p + 1], -1.0, 1, ()) for p in range(row.start, last))
                if asks
                else None
            )
        self.sampled = [token for own in tokens for token in own]
        return StepOutput(tuple(tokens), (None,) * len(tokens), tuple(prompt_logprobs),
                          pooled=pooled)  # fmt: skip

    def _read(self, blocks: Iterable[int], position: int) -> int | None:
        return self.device[list(blocks)[position // self.size]][position % self.size]

    def _check(self, blocks: Iterable[int], tokens: list[int]) -> int:
        """Every slot the row attends to must hold exactly the sequence's own history."""
        table = list(blocks)
        expected = 0
        for position, token in enumerate(tokens):
            expected = history(expected, token)
            found = self.device[table[position // self.size]][position % self.size]
            assert found == expected, f"position {position} holds another history"
        return expected


def request(
    name: str,
    prompt: list[int],
    *,
    arrival: float = 0.0,
    priority: int = 0,
    salt: str = "",
    tenant: str = "default",
    share: float = 1.0,
    **params: object,
) -> Request:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return Request(
        name,
        tuple(prompt),
        sampling,
        max_tokens=sampling.max_tokens or 8,
        eos_token_ids=frozenset({EOS}),
        stop_token_ids=frozenset(sampling.stop_token_ids or ()),
        arrival_time=arrival,
        priority=priority,
        cache_salt=salt,
        tenant=tenant,
        share=share,
    )


def run_all(
    config: SchedulerConfig, requests: list[Request], *, limit: int = 5000, ahead: bool = False
) -> tuple[dict[tuple[str, int], list[int]], Scheduler, list[StepPlan]]:
    """Run requests to the end: answers by (request id, index), the scheduler and all plans.

    With `ahead`, each step runs when the one after it has been planned.
    """
    scheduler = Scheduler(config)
    device = SimulatedDevice(scheduler)
    for item in requests:
        scheduler.add(item)
    answers: dict[tuple[str, int], list[int]] = {}
    plans: list[StepPlan] = []
    flying: IssuedStep | None = None

    def issued(plan: StepPlan | None) -> IssuedStep | None:
        scheduler.check_integrity()
        if plan is None:
            return None
        plans.append(plan)
        assert plan.num_tokens <= config.max_batched_tokens
        return device.issue(plan)

    while scheduler.has_work():
        step = flying or issued(scheduler.schedule())
        assert step is not None
        flying = issued(scheduler.schedule_ahead()) if ahead else None
        for event in scheduler.commit(step.plan, device.execute(step)):
            answers.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        scheduler.check_integrity()
        limit -= 1
        assert limit, "no end in sight"
    return answers, scheduler, plans


class Fuzzer:
    """Random traffic on one scheduler, every invariant checked after every call."""

    def __init__(
        self, config: SchedulerConfig, seed: int, ahead: float = 0.0, faults: float = 0.0
    ) -> None:
        self.faults = faults  # how often the device's memory runs out
        self.hopeless = 0  # answers given up because of that
        self.ahead = ahead  # how often a step is planned while one is in flight
        self.flying: IssuedStep | None = None
        self.planned_ahead = 0
        self.dropped = 0  # rows that were computed for nothing
        self.seed = seed
        self.random = random.Random(seed)
        self.scheduler = Scheduler(config)
        self.device = SimulatedDevice(self.scheduler)
        self.config = config
        self.live: dict[str, set[int]] = {}
        self.begun: set[tuple[str, int]] = set()  # answers with a token, not ended
        self.ended: dict[str, str] = {}
        self.pooled: dict[str, Request] = {}  # those that want embeddings
        self.count = 0
        self.prefixes = [
            [self.random.randrange(1, VOCABULARY) for _ in range(config.max_model_len // 2)]
            for _ in range(3)
        ]

    def arrive(self) -> None:
        rng = self.random
        top = self.config.max_model_len - 2
        prefix = rng.choice(self.prefixes)[: rng.randrange(0, top // 2 + 1)]
        own = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, max(2, top // 3)))]
        prompt = (prefix + own)[:top]
        n = rng.choice([1, 1, 1, 2, 3])
        self.count += 1
        item = request(
            f"r{self.count}",
            prompt,
            arrival=float(self.count),
            priority=rng.choice([0, 0, 0, 1, -1]),
            salt=rng.choice(["", "", "tenant"]),
            tenant=rng.choice(["a", "a", "b", "c"][: 1 + self.seed % 4]),
            share=rng.choice([1.0, 2.0]),
            n=min(n, self.config.max_num_sequences),
            max_tokens=rng.randrange(1, self.config.max_model_len - len(prompt) + 1),
            ignore_eos=rng.random() < 0.5,
            prompt_logprobs=1 if rng.random() < 0.1 else None,
        )
        if rng.random() < 0.15:
            pooling = rng.choice(POOLINGS)
            item = replace(item, params=SamplingParams(), max_tokens=0, pooling=pooling)
            self.pooled[item.request_id] = item
        self.scheduler.add(item)
        self.live[item.request_id] = set(range(item.params.n))

    def abort_one(self) -> None:
        if self.live and self.random.random() < 0.04:
            name = self.random.choice(list(self.live))
            assert self.scheduler.abort(name)
            assert not self.scheduler.abort(name)
            del self.live[name]
            self.ended[name] = "aborted"
            self.begun = {key for key in self.begun if key[0] != name}
            self.scheduler.check_integrity()
        if self.begun and self.random.random() < 0.03:  # one answer of n, as a stop string does
            name, index = self.random.choice(sorted(self.begun))
            assert self.scheduler.abort(name, index)
            assert not self.scheduler.abort(name, index)
            self._close(name, index, "aborted")
            self.scheduler.check_integrity()

    def _close(self, name: str, index: int, how: str) -> None:
        self.begun.discard((name, index))
        self.live[name].remove(index)
        if not self.live[name]:
            del self.live[name]
            self.ended[name] = how

    def _check_embedding(self, item: Request, event: TokenEvent) -> None:
        """Every token was pooled once, whatever happened to the sequence meanwhile."""
        assert event.finish_reason == "stop"
        length = len(item.prompt_token_ids)
        mean = item.pooling == "mean"
        wanted = position_sum(range(length) if mean else range(length - 1, length))
        found = np.frombuffer(event.embedding or b"", "<f4")
        np.testing.assert_allclose(found, wanted / (length if mean else 1), rtol=1e-6)

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            # A KeyError here is an event after the end.
            assert event.index in self.live[event.request_id]
            self.begun.add((event.request_id, event.index))
            item = self.pooled.get(event.request_id)
            assert (item is not None) == (event.embedding is not None)
            if item is not None:
                self._check_embedding(item, event)
            if event.finish_reason:
                self._close(event.request_id, event.index, "finished")

    def step(self) -> None:
        if self.random.random() < 0.25 and len(self.live) < 30:
            self.arrive()
        self.abort_one()
        self.advance()

    def advance(self) -> bool:
        """One step; False: there was none to run."""
        step = self.flying or self._issue(self.scheduler.schedule())
        if step is None:
            return False
        self.flying = None
        if self.random.random() < self.ahead:
            self.abort_one()
            self.flying = self._issue(self.scheduler.schedule_ahead())
            self.planned_ahead += self.flying is not None
        self.abort_one()
        if self.random.random() < self.faults:
            self._run_out(step)
            return True
        output = self.device.execute(step)
        self.abort_one()
        self.dropped += sum(row.sequence.aborted for row in step.plan.rows)
        self.take(self.scheduler.commit(step.plan, output))
        self.scheduler.check_integrity()
        return True

    def _run_out(self, step: IssuedStep) -> None:
        """The device finds no memory for a step: before its moves, or half-way through its rows."""
        moved = self.flying is None and self.random.random() < 0.5
        if moved:
            self.device.move(step.plan)
        self.flying = None
        for sequence in self.scheduler.retreat(moved):
            name = sequence.request.request_id
            for index in range(sequence.index, sequence.index + 1 + sequence.num_forks):
                self._close(name, index, "out of memory")
            self.hopeless += 1
        self.scheduler.check_integrity()

    def _issue(self, plan: StepPlan | None) -> IssuedStep | None:
        self.scheduler.check_integrity()
        return self.device.issue(plan) if plan is not None else None

    def drain(self) -> None:
        while self.scheduler.has_work():
            assert self.advance(), "no progress"
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        assert stats.blocks_used == 0
        assert stats.host_blocks_used == 0
        assert not self.live
        assert len(self.ended) == self.count
