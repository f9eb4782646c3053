"""Blocks of one tier: counts, eviction order, digests, and an integrity check that finds lies."""

from collections.abc import Callable

import pytest

from halyard.runtime.block_pool import BlockPool


def test_blocks_run_out_and_come_back() -> None:
    pool = BlockPool(3)
    taken = [pool.allocate() for _ in range(3)]
    assert taken == [(0, None), (1, None), (2, None)]
    assert (pool.num_free, pool.num_used, pool.num_cached) == (0, 3, 0)
    with pytest.raises(KeyError):
        pool.allocate()
    pool.release(1)
    assert pool.is_free(1)
    assert pool.allocate() == (1, None)


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    block, _ = pool.allocate()
    pool.acquire(block)
    pool.release(block)
    assert pool.references[block] == 1
    assert not pool.is_free(block)
    pool.release(block)
    assert pool.is_free(block)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(block)


def test_a_freed_block_stays_findable_until_it_is_evicted() -> None:
    pool = BlockPool(2)
    block, _ = pool.allocate()
    assert pool.publish(block, b"a")
    pool.release(block)
    assert pool.num_cached == 1
    assert pool.num_free == 2
    assert pool.find(b"a") == block

    pool.acquire(block)  # a hit
    assert (pool.num_cached, pool.num_free) == (0, 1)
    pool.release(block)

    assert pool.allocate() == (1, None)  # the blank one goes first
    assert pool.allocate() == (block, b"a")
    assert pool.find(b"a") is None


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(3)
    for name in (b"a", b"b", b"c"):
        block, _ = pool.allocate()
        pool.publish(block, name)
    for block in (0, 1, 2):
        pool.release(block)
    pool.acquire(0)  # a hit makes it the newest
    pool.release(0)
    assert [pool.allocate()[1] for _ in range(3)] == [b"b", b"c", b"a"]


def test_equal_content_is_published_once() -> None:
    pool = BlockPool(2)
    first, _ = pool.allocate()
    second, _ = pool.allocate()
    assert pool.publish(first, b"a")
    assert not pool.publish(second, b"a")
    assert pool.find(b"a") == first
    assert pool.digest(second) is None


def _lose_a_reference(pool: BlockPool) -> None:
    pool.references[0] = 0


def _free_twice(pool: BlockPool) -> None:
    pool._free[0] = None


def _lose_a_free_block(pool: BlockPool) -> None:
    del pool._free[2]


def _forget_a_digest(pool: BlockPool) -> None:
    pool._digests[1] = None


def _name_a_block_wrongly(pool: BlockPool) -> None:
    pool._by_digest[b"x"] = 0


def _miscount(pool: BlockPool) -> None:
    pool._num_cached += 1


@pytest.mark.parametrize(
    "damage",
    [_lose_a_reference, _free_twice, _lose_a_free_block, _forget_a_digest, _name_a_block_wrongly,
     _miscount],
)  # fmt: skip
def test_integrity_check_sees(damage: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(3)
    pool.allocate()
    block, _ = pool.allocate()
    pool.publish(block, b"a")
    pool.release(block)
    pool.check_integrity([0])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity([0])
