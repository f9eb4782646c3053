"""Blocks of one memory tier: reference counts, digests of full blocks, a free queue in eviction order.

    referenced   references > 0                             in use by sequences
    cached       references == 0, digest set                 findable until evicted, oldest first
    blank        references == 0, no digest                  reused before any cached block

Cached and blank blocks together are free: both can be allocated at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["BLANK", "CACHED", "SHARED", "USED", "BlockPool"]

BLANK, CACHED, USED, SHARED = range(4)
"""A block's state: free without or with a findable prefix, referenced once, or more often."""


class BlockPool:
    """The accounting of `num_blocks` blocks, ids 0 .. num_blocks - 1. Holds no memory itself."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks  # by block; to be read
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_cached = 0
        self._states = bytearray(num_blocks)  # kept for whoever draws them: a copy costs nothing

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Free blocks that still hold a findable prefix."""
        return self._num_cached

    def states(self) -> bytes:
        """One byte a block: BLANK, CACHED, USED or SHARED."""
        return bytes(self._states)

    def digest(self, block: int) -> bytes | None:
        return self._digests[block]

    def find(self, digest: bytes) -> int | None:
        """The block that holds this full block's content."""
        return self._by_digest.get(digest)

    def find_all(self, digests: Iterable[bytes]) -> list[int | None]:
        """As `find`, for each of them: prompts have hundreds."""
        return list(map(self._by_digest.get, digests))

    def is_free(self, block: int) -> bool:
        return self.references[block] == 0

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of them are free."""
        return list(map(self.references.__getitem__, blocks)).count(0)

    def allocate(self) -> tuple[int, bytes | None]:
        """Take the first block of the free queue: (block, digest of the content evicted with it)."""
        block, _ = self._free.popitem(last=False)
        evicted = self._digests[block]
        if evicted is not None:
            del self._by_digest[evicted]
            self._digests[block] = None
            self._num_cached -= 1
        self.references[block] = 1
        self._states[block] = USED
        return block, evicted

    def acquire(self, block: int) -> None:
        """Add a reference; a cached block leaves the free queue."""
        self.acquire_all((block,))

    def acquire_all(self, blocks: Iterable[int]) -> None:
        """As `acquire`, for each of them in turn."""
        references, states = self.references, self._states
        for block in blocks:
            if references[block] == 0:
                del self._free[block]
                self._num_cached -= self._digests[block] is not None
                states[block] = USED
            else:
                states[block] = SHARED
            references[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference. The last one frees the block: newest in eviction order if cached."""
        self.release_all((block,))

    def release_all(self, blocks: Iterable[int]) -> None:
        """As `release`, for each of them in turn."""
        references, states = self.references, self._states
        for block in blocks:
            count = references[block] - 1
            if count < 0:
                raise AssertionError(f"block {block} released more often than acquired")
            references[block] = count
            if count == 0:
                self._free[block] = None
                if self._digests[block] is None:
                    self._free.move_to_end(block, last=False)
                    states[block] = BLANK
                else:
                    self._num_cached += 1
                    states[block] = CACHED
            elif count == 1:
                states[block] = USED

    def publish(self, block: int, digest: bytes) -> bool:
        """Make a referenced full block findable. False if another block holds that content already."""
        if digest in self._by_digest:
            return False
        self._by_digest[digest] = block
        self._digests[block] = digest
        return True

    def retract(self, block: int) -> None:
        """Let nobody find a referenced block any more."""
        if self.references[block] == 0:
            raise AssertionError(f"block {block} is retracted, but nobody holds it")
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None

    def check_integrity(self, references: Iterable[int]) -> None:
        """Raise AssertionError unless the books balance.

        Args:
            references: block ids, one for every reference that holders outside believe to have.
        """
        expected = [0] * self.num_blocks
        for block in references:
            expected[block] += 1
        for block in range(self.num_blocks):
            count = self.references[block]
            if count != expected[block]:
                raise AssertionError(
                    f"block {block} has {count} references, its holders {expected[block]}"
                )
            if (count == 0) != (block in self._free):
                raise AssertionError(f"block {block} has {count} references and is misfiled")
            digest = self._digests[block]
            free = BLANK if digest is None else CACHED
            if self._states[block] != (free if count == 0 else USED if count == 1 else SHARED):
                raise AssertionError(f"block {block} is drawn as state {self._states[block]}")
            if digest is not None and self._by_digest.get(digest) != block:
                raise AssertionError(f"block {block} has a digest that doesn't lead to it")
        cached = sum(self._digests[block] is not None for block in self._free)
        if cached != self._num_cached:
            raise AssertionError(f"{cached} blocks are cached, counted {self._num_cached}")
        for digest, block in self._by_digest.items():
            if self._digests[block] != digest:
                raise AssertionError(f"the digest table names block {block} wrongly")
