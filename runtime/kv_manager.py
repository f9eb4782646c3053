"""Blocks for sequences: growth, copy on write, the prefix cache and the host tier.

One step's moves are gathered here while the scheduler plans, and taken once. They are executed in
the order swap_out, swap_in, copies, rows; the rules that make this safe:

- What a step reads or writes on the host, and every copy's source, is held (an extra reference)
  until the step is planned, so no block is claimed twice within a step. Steps run in the order they
  were planned in, so a later one may claim it before this one has run.
- A device block is demoted only when it is allocated again; its content was computed in an earlier
  step, so reading it first is right.
"""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import cast

import numpy as np

from halyard.hal.types import BlockMove
from halyard.runtime.block_pool import BlockPool
from halyard.runtime.config import SchedulerConfig
from halyard.runtime.sequence import Sequence

__all__ = ["KVCounters", "KVManager", "Moves"]

DIGEST_BYTES = 16
_MOST_ALIKE = 16  # prompts that others are compared with; their tokens are kept


@dataclass(frozen=True, slots=True)
class Moves:
    """The block moves of one step."""

    swap_out: tuple[BlockMove, ...]
    swap_in: tuple[BlockMove, ...]
    copies: tuple[BlockMove, ...]


@dataclass(slots=True)
class KVCounters:
    """Running totals since the start."""

    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of these, found
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    blocks_copied: int = 0
    evictions_demoted: int = 0  # device blocks whose prefix went to the host tier
    evictions_dropped: int = 0  # device blocks whose prefix was lost
    host_evictions: int = 0  # prefixes lost from the host tier
    slots_used: int = 0  # in blocks held, summed over every eighth step
    slots_wasted: int = 0  # of these, without a token

    @property
    def waste(self) -> float:
        """Share of slots in used blocks that hold no token, averaged over the steps counted."""
        return self.slots_wasted / self.slots_used if self.slots_used else 0.0


def _digest(content: bytes, parent: bytes = b"") -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES, key=parent).digest()


class _Alike:
    """Prompts digested lately, by their first block: the next one often begins as one of them did.

    To compare two prompts takes a hundredth of what their digests take, and where hundreds of them
    come at once with a long prefix in common, the device waits for that.
    """

    def __init__(self) -> None:
        self._lately: OrderedDict[bytes, tuple[bytes, list[bytes]]] = OrderedDict()

    def digests_of(self, content: bytes, known: list[bytes], width: int) -> None:
        """Append the digests of blocks in common with a prompt whose first block is `known`'s one.

        Args:
            content: its full blocks, `width` bytes each.
        """
        other = self._lately.get(known[0])
        if other is None:
            return
        known += other[1][1 : tokens_in_common(content, other[0]) * 8 // width]

    def keep(self, content: bytes, digests: list[bytes]) -> None:
        """Of a whole prompt; the list may grow, but not change."""
        self._lately[digests[0]] = (content, digests)
        self._lately.move_to_end(digests[0])
        if len(self._lately) > _MOST_ALIKE:
            self._lately.popitem(last=False)


def tokens_in_common(first: bytes, second: bytes) -> int:
    """How many tokens two packed prompts begin with alike."""
    length = min(len(first), len(second)) // 8
    same = np.frombuffer(first, np.int64, length) == np.frombuffer(second, np.int64, length)
    return length if same.all() else int(same.argmin())


def _packed(sequence: Sequence, first: int, end: int) -> bytes:
    """Tokens first .. end - 1 as int64. A prompt's are at hand: numbers one by one take longest here."""
    prompt = sequence.request.packed
    if not first and end * 8 <= len(prompt):
        return prompt[: end * 8]
    return struct.pack(f"{end - first}q", *sequence.token_ids[first:end])


class KVManager:
    """The two tiers and which sequence holds what. No tensor is touched here."""

    def __init__(
        self, num_blocks: int, num_host_blocks: int, block_size: int, prefix_cache: bool
    ) -> None:
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.device = BlockPool(num_blocks)
        self.host = BlockPool(num_host_blocks)
        self.counters = KVCounters()
        self._alike = _Alike()
        self._swap_out: list[BlockMove] = []
        self._swap_in: list[BlockMove] = []
        self._copies: list[BlockMove] = []
        self._held_device: list[int] = []
        self._held_host: list[int] = []

    # -- growth -------------------------------------------------------------------------------

    def blocks_to_grow(self, sequence: Sequence, num_tokens: int) -> int:
        """Device blocks that must be free so that `num_tokens` more tokens can be written."""
        end = sequence.num_computed_tokens + num_tokens
        new = -(-end // self.block_size) - len(sequence.block_ids)
        return new + (self._shared_tail(sequence) is not None)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence what `blocks_to_grow` said; copies its last block if it is shared."""
        shared = self._shared_tail(sequence)
        if shared is not None:
            position, block = shared
            copy = self._allocate()
            sequence.block_ids = sequence.block_ids[:]
            sequence.block_ids[position] = copy
            self._copies.append(BlockMove(block, copy))
            self._held_device.append(block)  # our reference becomes the hold
        end = sequence.num_computed_tokens + num_tokens
        for _ in range(-(-end // self.block_size) - len(sequence.block_ids)):
            sequence.block_ids.append(self._allocate())

    @classmethod
    def of(cls, config: SchedulerConfig) -> KVManager:
        """Empty tiers of the sizes that a scheduler is given."""
        return cls(
            config.num_blocks, config.num_host_blocks, config.block_size, config.prefix_cache
        )

    def sizes(self) -> dict[str, int]:
        """Blocks by tier and use, named as in SchedulerStats."""
        device, host = self.device, self.host
        return {
            "blocks_total": device.num_blocks,
            "blocks_used": device.num_used,
            "blocks_cached": device.num_cached,
            "host_blocks_total": host.num_blocks,
            "host_blocks_used": host.num_used,
            "host_blocks_cached": host.num_cached,
        }

    def count_waste(self, running: list[Sequence]) -> None:
        """A step was taken in: how full are the blocks that its sequences hold?"""
        size = self.block_size
        tails = {s.block_ids[-1]: -s.num_computed_tokens % size for s in running}
        self.counters.slots_wasted += sum(tails.values())
        self.counters.slots_used += self.device.num_used * size

    def release(self, sequence: Sequence) -> None:
        """Give back all blocks, last first, so that ends are evicted before beginnings."""
        self.device.release_all(reversed(sequence.block_ids))
        sequence.block_ids = array("i")
        self.host.release_all(reversed(sequence.host_block_ids))
        sequence.host_block_ids = []

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child share all blocks of its parent."""
        self.device.acquire_all(parent.block_ids)
        child.block_ids = array("i", parent.block_ids)
        child.block_digests = list(parent.block_digests)

    # -- prefix cache -------------------------------------------------------------------------

    def digests(self, sequence: Sequence) -> list[bytes]:
        """Digests of all full blocks of the tokens so far, each over everything before it."""
        known = sequence.block_digests
        size = self.block_size
        tokens = sequence.token_ids
        first, end = len(known) * size, len(tokens) // size * size
        if first == end:
            return known
        content = _packed(sequence, first, end)
        width = len(content) // ((end - first) // size)
        digest = known[-1] if known else _digest(sequence.request.cache_salt.encode())
        if not known and end > size:
            known.append(_digest(content[:width], digest))
            self._alike.digests_of(content, known, width)
            digest = known[-1]
        for start in range((len(known) - first // size) * width, len(content), width):
            digest = _digest(content[start : start + width], digest)
            known.append(digest)
        if not first and end > size:
            self._alike.keep(content, known)
        return known

    def reusable_digests(self, sequence: Sequence) -> list[bytes]:
        """Digests of the blocks a new sequence may take over: at least one token is computed."""
        if not self.prefix_cache or not sequence.request.reuses_prefix:
            return []
        return self.digests(sequence)[: (len(sequence.token_ids) - 1) // self.block_size]

    def find_prefix(self, digests: list[bytes]) -> tuple[int, int]:
        """How many leading blocks are in reach: (all, of these on the host or free on the device).

        The second number is what taking them costs in free device blocks.
        """
        blocks = self.device.find_all(digests)
        found = blocks.index(None) if None in blocks else len(blocks)
        cost = self.device.count_free(cast("list[int]", blocks[:found]))
        for digest, block in zip(digests[found:], blocks[found:], strict=True):
            if block is not None:
                cost += self.device.is_free(block)
            elif self.host.find(digest) is not None:
                cost += 1
            else:
                break
            found += 1
        return found, cost

    def take_prefix(self, sequence: Sequence, digests: list[bytes]) -> None:
        """Take over the blocks of `digests`, all in reach; those on the host are swapped in.

        Counts what was looked up and found.
        """
        blocks = self.device.find_all(digests)
        if None not in blocks:
            self.device.acquire_all(cast("list[int]", blocks))
            sequence.block_ids.extend(cast("list[int]", blocks))
        else:
            self._take(sequence, [(digest, self.host.find(digest)) for digest in digests])
        sequence.num_computed_tokens = len(digests) * self.block_size
        if self.prefix_cache:
            cached = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            if sequence.num_answer_tokens == 0:
                sequence.num_cached_tokens = cached
            self.counters.prefix_queries += sequence.num_prompt_tokens
            self.counters.prefix_hits += cached

    def publish(self, sequence: Sequence, first_token: int, end: int) -> Iterator[bytes]:
        """Make blocks findable that tokens first_token .. end - 1 fill, as far as these are known.

        Yields their digests.
        """
        if not self.prefix_cache:
            return
        first = first_token // self.block_size
        last = min(end, len(sequence.token_ids)) // self.block_size
        if first >= last:
            return
        digests = self.digests(sequence)
        for index in range(first, last):
            self.device.publish(sequence.block_ids[index], digests[index])
            yield digests[index]

    def retract(self, sequence: Sequence, first_token: int, end: int) -> None:
        """Its blocks of tokens first_token .. end - 1 are not what `publish` said they are."""
        for block in sequence.block_ids[first_token // self.block_size : end // self.block_size]:
            self.device.retract(block)

    # -- preemption by swap -------------------------------------------------------------------

    def can_swap_out(self, sequence: Sequence) -> bool:
        return len(sequence.block_ids) <= self.host.num_free

    def swap_out(self, sequence: Sequence) -> None:
        """Move the sequence to the host tier. A prefix block that is there already is shared."""
        for block in sequence.block_ids:
            digest = self.device.digest(block)
            there = self.host.find(digest) if digest is not None else None
            if there is not None:
                self.host.acquire(there)
            else:
                there = self._allocate_host()
                if digest is not None:
                    self.host.publish(there, digest)
                self._move_out(block, there)
            sequence.host_block_ids.append(there)
        for block in reversed(sequence.block_ids):
            self.device.release(block)
        sequence.block_ids = array("i")

    def blocks_to_swap_in(self, sequence: Sequence) -> int:
        """Device blocks that must be free to bring a swapped sequence back."""
        return sum(
            device is None or self.device.is_free(device)
            for device in (self._device_twin(block) for block in sequence.host_block_ids)
        )

    def swap_in(self, sequence: Sequence) -> None:
        """Bring a swapped sequence back and give its host blocks up."""
        pairs: list[tuple[bytes | None, int | None]] = [
            (self.host.digest(block), block) for block in sequence.host_block_ids
        ]
        self._take(sequence, pairs)
        for block in sequence.host_block_ids:
            self.host.release(block)
        sequence.host_block_ids = []

    # -- one step's moves ---------------------------------------------------------------------

    def take_moves(self) -> Moves:
        """The moves gathered since the last call."""
        moves = Moves(tuple(self._swap_out), tuple(self._swap_in), tuple(self._copies))
        self.counters.blocks_swapped_out += len(moves.swap_out)
        self.counters.blocks_swapped_in += len(moves.swap_in)
        self.counters.blocks_copied += len(moves.copies)
        self._swap_out, self._swap_in, self._copies = [], [], []
        return moves

    def release_holds(self) -> None:
        """The step that needs the moves is planned."""
        for block in self._held_device:
            self.device.release(block)
        for block in self._held_host:
            self.host.release(block)
        self._held_device, self._held_host = [], []

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless every reference has a holder and every holder a reference."""
        self.device.check_integrity(
            [*(block for s in sequences for block in s.block_ids), *self._held_device]
        )
        self.host.check_integrity(
            [*(block for s in sequences for block in s.host_block_ids), *self._held_host]
        )

    # -- inside -------------------------------------------------------------------------------

    def _shared_tail(self, sequence: Sequence) -> tuple[int, int] | None:
        """The block that the next token goes to, if it exists and others hold it too.

        This step's holds don't count: copies run before rows write.
        """
        position = sequence.num_computed_tokens // self.block_size
        if position < len(sequence.block_ids):
            block = sequence.block_ids[position]
            if self.device.references[block] - self._held_device.count(block) > 1:
                return position, block
        return None

    def _device_twin(self, host_block: int) -> int | None:
        digest = self.host.digest(host_block)
        return self.device.find(digest) if digest is not None else None

    def _take(self, sequence: Sequence, wanted: list[tuple[bytes | None, int | None]]) -> None:
        """Append device blocks for (digest, host block) pairs: found by digest, or swapped in.

        Device hits are acquired before anything is allocated, and host sources are held, so that
        making room for one block can't evict another.
        """
        found: list[int | None] = []
        for digest, host_block in wanted:
            block = self.device.find(digest) if digest is not None else None
            if block is not None:
                self.device.acquire(block)
            elif host_block is not None:
                self._hold_host(host_block)
            found.append(block)
        for block, (digest, host_block) in zip(found, wanted, strict=True):
            if block is None:
                if host_block is None:
                    raise AssertionError("a prefix block that was in reach is gone")
                block = self._allocate()
                self._swap_in.append(BlockMove(host_block, block))
                if digest is not None:
                    self.device.publish(block, digest)
            sequence.block_ids.append(block)

    def _allocate(self) -> int:
        """A device block; what it held in the prefix cache goes to the host tier if there's room."""
        block, evicted = self.device.allocate()
        if evicted is not None:
            if self.host.find(evicted) is not None:
                self.counters.evictions_demoted += 1
            elif self.host.num_free > 0:
                target = self._allocate_host()
                self.host.publish(target, evicted)
                self._move_out(block, target)
                self.host.release(target)  # cached there; the step's hold keeps it in place
                self.counters.evictions_demoted += 1
            else:
                self.counters.evictions_dropped += 1
        return block

    def _allocate_host(self) -> int:
        block, evicted = self.host.allocate()
        self.counters.host_evictions += evicted is not None
        return block

    def _move_out(self, source: int, target: int) -> None:
        self._swap_out.append(BlockMove(source, target))
        self._hold_host(target)

    def _hold_host(self, block: int) -> None:
        self.host.acquire(block)
        self._held_host.append(block)
