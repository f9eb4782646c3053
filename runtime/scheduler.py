"""Decides what every step computes. Imports no torch; its whole world is token counts and blocks.

Running sequences come first, in order of priority and arrival; each gets at least one token, and
prompts share what is left of the token budget in chunks. Then swapped sequences come back, then
waiting ones are admitted, fairly among tenants, and share what others compute in this very step.
When blocks run out, the last in order gives way, where tenants compete that of who had the most.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter

from halyard.hal.errors import RequestError
from halyard.runtime.config import SchedulerConfig
from halyard.runtime.fair_queue import ANSWER_COST, FairQueue
from halyard.runtime.kv_manager import KVManager
from halyard.runtime.plan import PlanRow, StepOutput, StepPlan, TokenEvent, make_row
from halyard.runtime.request import Request
from halyard.runtime.scheduler_checks import Books, check_books
from halyard.runtime.sequence import Sequence, SequenceStatus
from halyard.runtime.stats import SchedulerStats
from halyard.runtime.step_counts import StepCounts
from halyard.runtime.step_limits import StepLimits

__all__ = ["Scheduler"]

_ORDER = attrgetter("order")


class Scheduler:
    """schedule() -> plan -> (somebody runs it) -> commit(plan, output).

    While a plan is in flight, schedule_ahead() may make the one after it; plans are committed in
    their order. `add` and `abort` may come at any moment, also between schedule and commit; memory
    of a sequence that is in flight is freed by the commit of its last plan.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.limits = StepLimits(config.max_num_sequences, config.max_batched_tokens)
        self.kv = KVManager.of(config)
        self._waiting = FairQueue()
        self._swapped: list[Sequence] = []  # sorted by order
        self._running: list[Sequence] = []  # sorted by order
        self._by_request: dict[str, list[Sequence]] = {}
        self._in_progress: dict[bytes, Sequence] = {}  # prefix blocks being computed, by whom
        self._sequence_ids = itertools.count()
        self._steps = itertools.count()
        self._counts = StepCounts()  # of the step that is being planned
        self._plans: deque[StepPlan] = deque()  # scheduled, not committed: at most two
        self._short = False  # the last plan ahead found too few blocks: one must be made behind
        self._num_reserved = 0  # answers of running sequences that will be forked off
        self._preemptions = {"preemptions_swap": 0, "preemptions_recompute": 0}

    # -- requests -----------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._swapped or self._plans)

    def add(self, request: Request) -> None:
        """Queue a request. Its id must not be in use."""
        if request.request_id in self._by_request:
            raise AssertionError(f"request id {request.request_id} is in use")
        if len(request.prompt_token_ids) + request.max_tokens > self.config.max_model_len:
            raise AssertionError(f"request {request.request_id} was not fitted to the context")
        sequence = Sequence.first_of(request, next(self._sequence_ids))
        self._by_request[request.request_id] = [sequence]
        self._waiting.enter(request)
        self._waiting.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Give up a request, or one of its answers. No event follows. False if it isn't known."""
        sequences = self._by_request.get(request_id, [])
        chosen = [s for s in sequences if index is None or s.index == index]
        for sequence in chosen:
            self._remove(sequence)
        return bool(chosen)

    def detach(self, request_id: str) -> Sequence:
        """Let go of a request's only sequence, between steps, for another engine to go on with. It keeps
        its blocks until the caller releases them (`kv.release`) or adopts it again.

        Raises:
            RequestError: no such request, or it has several answers.
        """
        sequences = self._by_request.get(request_id, [])
        if len(sequences) != 1 or sequences[0].num_forks:
            what = "is not running here" if not sequences else "has several answers"
            raise RequestError(f"request {request_id} {what}: it can't be moved")
        (sequence,) = sequences
        if self._plans:
            raise AssertionError("a sequence is detached between steps only")
        self._unlist(sequence)
        self._forget_progress(sequence)
        del self._by_request[request_id]
        self._waiting.leave(sequence.request)
        return sequence

    def adopt(self, sequence: Sequence) -> bool:
        """Go on with a sequence that another engine detached: tokens, no blocks. True: it runs, and has
        blocks for the tokens it had computed, which the caller fills before the next step. False:
        there is no room for that now; it waits and computes them again.
        """
        request = sequence.request
        if request.request_id in self._by_request:
            raise AssertionError(f"request id {request.request_id} is in use")
        if sequence.num_prompt_tokens + request.max_tokens > self.config.max_model_len:
            raise RequestError(
                f"request {request.request_id} may grow to "
                f"{sequence.num_prompt_tokens + request.max_tokens} tokens, here are at most "
                f"{self.config.max_model_len}"
            )
        sequence.seq_id = next(self._sequence_ids)
        self._by_request[request.request_id] = [sequence]
        self._waiting.enter(request)
        size = self.config.block_size
        computed, sequence.num_computed_tokens = sequence.num_computed_tokens, 0
        needed = -(-computed // size)
        if 0 < needed <= self.kv.device.num_free and self._has_seat(sequence):
            self.kv.grow(sequence, computed)
            sequence.num_computed_tokens = computed
            self._start(sequence)
            return True
        sequence.restart()
        self._waiting.add(sequence)
        return False

    def reset(self) -> None:
        """Give up all requests and forget all prefixes: for when a step broke off half-way.

        What blocks hold then is unknown, and so is how far the books of that step got. Totals stay.
        """
        self._forget_memory()
        for sequence in itertools.chain(*self._by_request.values()):
            sequence.status = SequenceStatus.FINISHED
        self._waiting = FairQueue()
        self._swapped.clear()
        self._running.clear()
        self._by_request.clear()
        self._in_progress.clear()
        self._plans.clear()
        self._counts = StepCounts()
        self._num_reserved = 0

    def retreat(self, moved: bool) -> list[Sequence]:
        """The device's memory was too small for the steps in flight: put their rows back, do less.

        They wait, and compute again what they had. Returns those that do not fit even alone: they
        are given up, and no event follows. Unless the steps' block moves were made, all blocks are
        forgotten.
        """
        plan = max(self._plans, key=attrgetter("num_tokens"))
        smaller = self.limits.shrink(len(plan.rows), plan.num_tokens)
        flying = dict.fromkeys(row.sequence for plan in self._plans for row in plan.rows)
        for row in itertools.chain(*(plan.rows for plan in self._plans)):
            self.kv.retract(row.sequence, row.start, row.end)
        self._plans.clear()
        for sequence in flying:
            sequence.in_flight = sequence.num_pending_tokens = 0
            (self.kv.release if sequence.aborted else self._put_back)(sequence)
        if not moved:
            for sequence in [*self._running, *self._swapped]:
                self._put_back(sequence)
            self._forget_memory()
        hopeless = [] if smaller else [s for s in flying if not s.aborted]
        for sequence in hopeless:
            self._remove(sequence)
        return hopeless

    def _forget_memory(self) -> None:
        counters, self.kv = self.kv.counters, KVManager.of(self.config)
        self.kv.counters = counters

    # -- planning -----------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan one step, with none in flight. None if there is nothing to run."""
        if self._plans:
            raise AssertionError("the last plan has not been committed")
        self._short = False
        rows = self._plan_rows()
        if not rows:
            if self._running or self._waiting or self._swapped:
                raise AssertionError("there is work but nothing could be scheduled")
            return None
        return self._issue(rows)

    def schedule_ahead(self) -> StepPlan | None:
        """Plan the step after the one in flight, whose tokens nobody knows yet.

        A row that turns out to have ended is computed for nothing; its tokens are dropped. Nobody
        gives way: where blocks run short, the rest waits for the next schedule(). None if nothing
        can run before the commit.
        """
        if len(self._plans) != 1:
            raise AssertionError("a step is planned ahead of exactly one other")
        if self._short or self._num_reserved:
            return None
        rows = self._plan_rows(ahead=True)
        return self._issue(rows) if rows else None

    def _plan_rows(self, ahead: bool = False) -> list[PlanRow]:
        rows: list[PlanRow] = []
        if not self._plan_running(rows, ahead):
            if self._swapped:
                self._resume_swapped(rows)
            if self._waiting and not self._swapped:
                self._admit_waiting(rows)
        return rows

    def _issue(self, rows: list[PlanRow]) -> StepPlan:
        """Rows become a plan in flight."""
        counts, self._counts = self._counts, StepCounts()
        moves = self.kv.take_moves()
        self.kv.release_holds()
        plan = counts.plan(next(self._steps), rows, moves)
        self._plans.append(plan)
        return plan

    def _plan_running(self, rows: list[PlanRow], ahead: bool) -> bool:
        """Rows for running sequences. True if one had to give way or, ahead, to wait."""
        preempted = False
        budget = self.limits.num_tokens
        size, contended = self.config.block_size, self._waiting.contended
        references, counts = self.kv.device.references, self._counts
        for position, sequence in enumerate(self._running, 1):  # its end may go meanwhile
            start = sequence.num_computed_tokens
            pending = sequence.num_pending_tokens
            num_tokens = len(sequence.token_ids) + pending
            if pending and num_tokens >= sequence.max_len:
                continue  # it ends with what is being sampled
            remaining, blocks, at = num_tokens - start, sequence.block_ids, start // size
            if sequence.decodes and at < len(blocks) and references[blocks[at]] == 1:
                # Most rows of most steps: a slot in a block of its own. As _plan_row, without the calls.
                source = sequence.sample_index if pending else -1
                rows.append(make_row((sequence, start, 1, 1, source)))
                sequence.num_computed_tokens = start + 1
                sequence.in_flight += 1
                sequence.num_pending_tokens = pending + 1
                sequence.sample_index = counts.num_samples
                counts.num_samples += 1
                counts.num_tokens += 1
                if contended:
                    self._waiting.charge(sequence.request, ANSWER_COST)
                budget -= 1
                continue
            if remaining > 1:  # leave one token for each sequence behind
                behind = len(self._running) - position
                remaining = min(remaining, max(1, budget - behind))
            while self.kv.blocks_to_grow(sequence, remaining) > self.kv.device.num_free:
                if ahead:
                    self._short = True
                    return True
                preempted = True
                victim = self._waiting.victim(self._running, position)
                self._preempt(victim)
                if victim is sequence:
                    return True
            self._plan_row(rows, sequence, remaining)
            budget -= remaining
        return preempted

    def _plan_row(self, rows: list[PlanRow], sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed_tokens
        self.kv.grow(sequence, num_tokens)
        samples = 1 + sequence.num_forks if start + num_tokens == sequence.num_tokens else 0
        source = sequence.sample_index if sequence.num_pending_tokens else -1
        rows.append(PlanRow(sequence, start, num_tokens, samples, source))
        sequence.num_computed_tokens = start + num_tokens
        self._counts.add(sequence, start, num_tokens, samples)
        # Who is planned from here on may read its blocks, in this very step: all rows write first.
        for digest in self.kv.publish(sequence, start, start + num_tokens):
            self._in_progress.pop(digest, None)
        if self._waiting.contended:
            cost = 1 if start < sequence.num_prompt_tokens else ANSWER_COST
            self._waiting.charge(sequence.request, cost * num_tokens)

    def _has_seat(self, sequence: Sequence) -> bool:
        """May it run beside those that run, its forks included?"""
        seats = len(self._running) + self._num_reserved + 1 + sequence.num_forks
        return seats <= self.limits.num_rows or not self._running

    def _start(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.mark_started()
        insort(self._running, sequence, key=_ORDER)
        self._num_reserved += sequence.num_forks

    def _resume_swapped(self, rows: list[PlanRow]) -> None:
        budget = self.limits.num_tokens - sum(row.num_tokens for row in rows)
        while self._swapped and budget > 0:
            sequence = self._swapped[0]
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget)
            size = self.config.block_size
            end = sequence.num_computed_tokens + num_tokens
            grown = -(-end // size) - len(sequence.host_block_ids)
            needed = self.kv.blocks_to_swap_in(sequence) + grown
            if not self._has_seat(sequence) or needed > self.kv.device.num_free:
                return
            del self._swapped[0]
            self.kv.swap_in(sequence)
            self._start(sequence)
            self._plan_row(rows, sequence, num_tokens)
            budget -= num_tokens

    def _admit_waiting(self, rows: list[PlanRow]) -> None:
        budget = self.limits.num_tokens - sum(row.num_tokens for row in rows)
        for sequence in self._waiting.in_turn():
            if budget <= 0:
                return
            if sequence.waits_for is not None and sequence.waits_for in self._in_progress:
                continue  # another one is computing its next block: share it when it's done
            sequence.waits_for = None
            digests = self.kv.reusable_digests(sequence)
            found, cost = self.kv.find_prefix(digests)
            if found < len(digests) and digests[found] in self._in_progress:
                sequence.waits_for = digests[found]
                continue
            size = self.config.block_size
            remaining = len(sequence.token_ids) - found * size
            num_tokens = min(remaining, budget)
            # Beside others a prompt is admitted only if all of it fits, so that half-read prompts
            # don't crowd each other out; alone, its first chunk is enough.
            wanted = remaining if self._running else num_tokens
            needed = cost + -(-(found * size + wanted) // size) - found
            if not self._has_seat(sequence) or needed > self.kv.device.num_free:
                return
            self._waiting.remove(sequence)
            self.kv.take_prefix(sequence, digests[:found])
            self._in_progress.update(dict.fromkeys(digests[found:], sequence))
            self._start(sequence)
            self._plan_row(rows, sequence, num_tokens)
            budget -= num_tokens

    def _preempt(self, victim: Sequence) -> None:
        """Take a running sequence off the device."""
        if victim.in_flight:
            raise AssertionError("a sequence in flight can't give way")
        if self._should_swap(victim):
            self._unlist(victim)
            self._forget_progress(victim)
            self._preemptions["preemptions_swap"] += 1
            self.kv.swap_out(victim)
            victim.status = SequenceStatus.SWAPPED
            insort(self._swapped, victim, key=_ORDER)
        else:
            self._put_back(victim)

    def _put_back(self, sequence: Sequence) -> None:
        """It waits again, and computes again what it had."""
        self._unlist(sequence)
        self._forget_progress(sequence)
        self._preemptions["preemptions_recompute"] += 1
        self.kv.release(sequence)
        sequence.restart()
        self._waiting.add(sequence)

    def _should_swap(self, victim: Sequence) -> bool:
        if self.config.preemption == "recompute" or not self.kv.can_swap_out(victim):
            return False
        if self.config.preemption == "swap":
            return True
        return self.config.cost.swap_is_cheaper(len(victim.block_ids), victim.num_computed_tokens)

    # -- results ------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, output: StepOutput) -> list[TokenEvent]:
        """Take in what a step computed: append, fork, finish, free."""
        if not self._plans or plan is not self._plans[0]:
            raise AssertionError("commit is for the oldest plan in flight")
        self._plans.popleft()
        self.limits.grow()
        events: list[TokenEvent] = []
        ended: list[Sequence] = []
        size, logprobs = self.config.block_size, output.logprobs
        for number, (row, tokens) in enumerate(zip(plan.rows, output.token_ids, strict=True)):
            sequence, start, num_tokens, num_samples, _ = row
            sequence.in_flight -= 1
            if num_samples:
                sequence.num_pending_tokens -= 1
            if sequence.aborted:
                if not sequence.in_flight:
                    self.kv.release(sequence)
                continue
            end = start + num_tokens
            if num_tokens == 1 and not end % size:  # of longer rows all was known when planned
                for digest in self.kv.publish(sequence, start, end):
                    self._in_progress.pop(digest, None)
            if sequence.decodes and logprobs[number] is None:
                event = sequence.take(tokens)
                events.append(event)
                if event[5] is not None:  # its finish_reason
                    ended.append(sequence)
                continue
            for answer, event in self._take_in(number, row, output):
                events.append(event)
                if event.finish_reason is not None:
                    ended.append(answer)
        if plan.step % 8 == 0:  # a sample is enough for an average
            self.kv.count_waste(self._running)
        for sequence in ended:
            self._remove(sequence)
        return events

    def _take_in(
        self, number: int, row: PlanRow, output: StepOutput
    ) -> Iterator[tuple[Sequence, TokenEvent]]:
        """What row `number` of a step brought, whatever it is: answers and their news."""
        sequence, logprobs = row.sequence, output.logprobs[number]
        prompt_logprobs = output.prompt_logprobs[number]
        if prompt_logprobs is not None and not sequence.prompt_logprobs_sent:
            sequence.prompt_logprobs.extend(prompt_logprobs)
        if number in output.pooled:
            sequence.pool(output.pooled[number])
        if not row.num_samples:
            return
        if sequence.pools:
            yield sequence, sequence.embedded()
            return
        for position, answer in enumerate(self._fork(sequence)):
            token = output.token_ids[number][position]
            yield answer, answer.append(token, logprobs[position] if logprobs else None)

    def _fork(self, parent: Sequence) -> list[Sequence]:
        """The answers 0 .. n - 1: at the first sampled token the others split off."""
        children = [parent]
        for number in range(parent.num_forks):
            child = parent.fork(next(self._sequence_ids), number + 1)
            self.kv.fork(parent, child)
            self._by_request[parent.request.request_id].append(child)
            insort(self._running, child, key=_ORDER)
            children.append(child)
        self._num_reserved -= parent.num_forks
        parent.num_forks = 0
        return children

    # -- bookkeeping --------------------------------------------------------------------------

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the books; memory in flight is freed by the commit."""
        self._unlist(sequence)
        self._forget_progress(sequence)
        sequence.status = SequenceStatus.FINISHED
        if sequence.in_flight:
            sequence.aborted = True
        else:
            self.kv.release(sequence)
        siblings = self._by_request[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.request_id]
            self._waiting.leave(sequence.request)

    def _unlist(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._num_reserved -= sequence.num_forks
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is SequenceStatus.SWAPPED:
            self._swapped.remove(sequence)

    def _forget_progress(self, sequence: Sequence) -> None:
        """It computes no more prompt blocks that others could wait for."""
        if not self._in_progress:
            return
        for digest in sequence.block_digests:
            if self._in_progress.get(digest) is sequence:
                del self._in_progress[digest]

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._running), num_waiting=len(self._waiting),
            num_swapped=len(self._swapped), kv_waste=self.kv.counters.waste, **self.kv.sizes(),
            **self._preemptions,
            counters=replace(self.kv.counters),
            out_of_memory=self.limits.num_failures, max_rows=self.limits.num_rows,
        )  # fmt: skip

    def queues(self) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
        """Running, waiting and swapped sequences, each in order of service: copies."""
        return list(self._running), list(self._waiting), list(self._swapped)

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        self._waiting.check_integrity()
        check_books(Books(self.kv, *self.queues(), self._plans, self._by_request, self._in_progress,
                          self._num_reserved))  # fmt: skip
