"""Growth, copy on write, prefix cache and host tier, one rule a test."""

import random
import struct
from dataclasses import replace

import pytest
from scheduler_model import request

from halyard.hal.types import BlockMove
from halyard.runtime.kv_manager import KVManager
from halyard.runtime.sequence import Sequence

SIZE = 4


def manager(device: int = 8, host: int = 0, prefix_cache: bool = True) -> KVManager:
    return KVManager(device, host, SIZE, prefix_cache)


def sequence(tokens: list[int], salt: str = "", **params: object) -> Sequence:
    made = request("r", tokens, salt=salt, **params)  # type: ignore[arg-type]
    return Sequence(0, made, 0, list(tokens), num_prompt_tokens=len(tokens))


def compute(kv: KVManager, item: Sequence, num_tokens: int) -> None:
    """What a step does: grow, run, publish."""
    start = item.num_computed_tokens
    kv.grow(item, num_tokens)
    item.num_computed_tokens += num_tokens
    list(kv.publish(item, start, item.num_computed_tokens))
    kv.take_moves()
    kv.release_holds()


def computed(kv: KVManager, tokens: list[int], **options: object) -> Sequence:
    item = sequence(tokens, **options)  # type: ignore[arg-type]
    compute(kv, item, len(tokens))
    return item


def test_growth_takes_blocks_as_they_are_needed() -> None:
    kv = manager()
    item = sequence([*range(1, 12)])
    assert kv.blocks_to_grow(item, 4) == 1
    assert kv.blocks_to_grow(item, 5) == 2
    compute(kv, item, 5)
    assert len(item.block_ids) == 2
    assert kv.blocks_to_grow(item, 3) == 0
    compute(kv, item, 3)
    assert kv.blocks_to_grow(item, 1) == 1
    kv.check_integrity([item])
    kv.release(item)
    kv.check_integrity([])


def test_digests_taken_over_from_another_prompt_are_its_own() -> None:
    """Whatever came before: prompts that begin alike, end within a block, have another salt."""
    rng, kv = random.Random(1), manager(device=4)
    stem = [rng.randrange(3) for _ in range(60)]
    for _ in range(300):
        tokens = stem[: rng.randrange(60)] + [rng.randrange(3) for _ in range(rng.randrange(20))]
        salt = rng.choice(["", "a"])
        asked, alone = sequence(tokens, salt), sequence(tokens, salt)
        expected = [manager(device=4).digests(alone)[at] for at in range(len(tokens) // SIZE)]
        assert kv.digests(asked) == expected
        packed = replace(asked.request, packed=struct.pack(f"{len(tokens)}q", *tokens))
        at_hand = Sequence(0, packed, 0, list(tokens), num_prompt_tokens=len(tokens))
        at_hand.token_ids += [rng.randrange(3) for _ in range(rng.randrange(12))]
        alone.token_ids, alone.block_digests = list(at_hand.token_ids), []
        assert manager(device=4).digests(at_hand) == manager(device=4).digests(alone)
        asked.token_ids += [rng.randrange(3) for _ in range(rng.randrange(12))]  # an answer
        alone.token_ids, alone.block_digests = list(asked.token_ids), []
        assert kv.digests(asked) == manager(device=4).digests(alone)


def test_digests_depend_on_everything_before_and_on_the_salt() -> None:
    kv = manager()

    def digests(tokens: list[int], salt: str = "") -> list[bytes]:
        return list(kv.digests(sequence(tokens, salt)))

    base = digests([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(base) == 2  # the ninth token fills no block
    assert digests([1, 2, 3, 4, 5, 6, 7, 8]) == base
    assert digests([1, 2, 3, 4, 5, 6, 7, 9])[0] == base[0]
    assert digests([1, 2, 3, 4, 5, 6, 7, 9])[1] != base[1]
    assert digests([0, 2, 3, 4, 5, 6, 7, 8])[1] != base[1]
    assert not set(digests([1, 2, 3, 4, 5, 6, 7, 8], "tenant")) & set(base)
    assert len(set(digests([1] * 12))) == 3  # equal blocks at different places


def test_the_last_prompt_token_is_always_computed() -> None:
    kv = manager()
    assert len(kv.reusable_digests(sequence([1] * 8))) == 1
    assert len(kv.reusable_digests(sequence([1] * 9))) == 2
    assert kv.reusable_digests(sequence([1] * 9, prompt_logprobs=1)) == []
    assert manager(prefix_cache=False).reusable_digests(sequence([1] * 9)) == []


def test_a_prefix_hit_shares_blocks() -> None:
    kv = manager()
    first = computed(kv, [*range(1, 10)])
    second = sequence([*range(1, 9), 30, 31])
    digests = kv.reusable_digests(second)
    assert kv.find_prefix(digests) == (2, 0)
    kv.take_prefix(second, digests)
    assert list(second.block_ids) == list(first.block_ids[:2])
    assert second.num_computed_tokens == 8
    kv.check_integrity([first, second])
    kv.release(first)
    third = sequence([*range(1, 9), 40])
    assert kv.find_prefix(kv.reusable_digests(third)) == (2, 0)  # second still holds them
    kv.release(second)
    assert kv.find_prefix(kv.reusable_digests(third)) == (2, 2)  # free now: taking them costs
    assert kv.device.num_cached == 2


def test_ends_are_evicted_before_beginnings() -> None:
    kv = manager(device=3)
    kv.release(computed(kv, [*range(1, 13)]))
    other = sequence([50, 51])
    kv.grow(other, 2)
    again = sequence([*range(1, 13), 0])
    assert kv.find_prefix(kv.reusable_digests(again)) == (2, 2)
    assert kv.counters.evictions_dropped == 1


def test_forks_copy_the_shared_last_block_and_the_last_one_writes_in_place() -> None:
    kv = manager()
    parent = computed(kv, [*range(1, 7)])
    children = [sequence([*range(1, 7)]) for _ in range(2)]
    for child in children:
        child.num_computed_tokens = 6
        kv.fork(parent, child)
    family = [parent, *children]
    tail = parent.block_ids[-1]
    assert kv.device.num_used == 2
    copied = []
    for member in family:
        copied.append(kv.blocks_to_grow(member, 1))
        kv.grow(member, 1)
        kv.check_integrity(family)
    assert copied == [1, 1, 0]
    assert children[1].block_ids[-1] == tail
    copies = kv.take_moves().copies
    assert [move.source for move in copies] == [tail, tail]
    assert len({member.block_ids[-1] for member in family}) == 3
    assert len({member.block_ids[0] for member in family}) == 1
    kv.release_holds()
    for member in family:
        kv.release(member)
    kv.check_integrity([])


def test_a_copied_block_is_not_reused_before_the_step_has_run() -> None:
    kv = manager(device=3)
    parent = computed(kv, [1, 2])
    child = sequence([1, 2])
    child.num_computed_tokens = 2
    kv.fork(parent, child)
    kv.grow(child, 1)
    source = kv.take_moves().copies[0].source
    kv.release(parent)  # nobody's any more, but the copy still reads it
    assert [kv.device.allocate()[0]] != [source]
    assert kv.device.num_free == 0
    kv.release_holds()
    assert kv.device.num_free == 1


def test_swap_out_and_in_brings_every_block_back() -> None:
    kv = manager(device=6, host=3, prefix_cache=False)
    item = computed(kv, [*range(1, 11)])
    before = list(item.block_ids)
    assert kv.can_swap_out(item)
    kv.swap_out(item)
    kv.check_integrity([item])
    out = kv.take_moves().swap_out
    assert [move.source for move in out] == before
    assert [move.target for move in out] == item.host_block_ids
    assert kv.device.num_free == 6
    kv.release_holds()

    assert kv.blocks_to_swap_in(item) == 3
    sources = list(item.host_block_ids)
    kv.swap_in(item)
    kv.check_integrity([item])
    back = kv.take_moves().swap_in
    assert back == tuple(map(BlockMove, sources, item.block_ids))
    assert kv.host.num_free == 0  # still being read
    kv.release_holds()
    assert kv.host.num_free == 3
    assert (kv.counters.blocks_swapped_out, kv.counters.blocks_swapped_in) == (3, 3)


def test_swapping_in_reuses_blocks_that_are_still_on_the_device() -> None:
    kv = manager(device=6, host=6)
    item = computed(kv, [*range(1, 11)])
    before = list(item.block_ids)
    kv.swap_out(item)
    kv.take_moves()
    kv.release_holds()
    assert kv.blocks_to_swap_in(item) == 3
    kv.swap_in(item)
    assert list(item.block_ids[:2]) == before[:2]
    assert len(kv.take_moves().swap_in) == 1  # only the partial block has to travel


def test_too_small_a_host_tier_refuses_to_swap() -> None:
    kv = manager(host=2)
    assert not kv.can_swap_out(computed(kv, [*range(1, 11)]))
    assert not manager().can_swap_out(computed(kv, [1]))


def test_an_evicted_prefix_moves_to_the_host_and_is_found_there() -> None:
    kv = manager(device=2, host=2)
    kv.release(computed(kv, [*range(1, 9)]))
    other = sequence([50] * 8)
    kv.grow(other, 8)
    moves = kv.take_moves()
    assert {move.source for move in moves.swap_out} == set(other.block_ids)
    assert kv.counters.evictions_demoted == 2
    kv.release_holds()
    kv.release(other)

    again = sequence([*range(1, 9), 0])
    digests = kv.reusable_digests(again)
    assert kv.find_prefix(digests) == (2, 2)
    kv.take_prefix(again, digests)
    assert len(kv.take_moves().swap_in) == 2
    kv.check_integrity([again])


def test_a_host_block_that_is_read_is_not_overwritten_in_the_same_step() -> None:
    kv = manager(device=2, host=1)
    kv.release(computed(kv, [1, 2, 3, 4]))
    filler = computed(kv, [60] * 8)  # the prefix goes to the only host block
    assert kv.counters.evictions_demoted == 1
    kv.release(filler)  # two cached blocks on the device now
    again = sequence([1, 2, 3, 4, 9])
    kv.take_prefix(again, kv.reusable_digests(again))
    kv.grow(again, 1)
    moves = kv.take_moves()
    assert len(moves.swap_in) == 1
    assert moves.swap_out == ()  # what was evicted for it had nowhere to go
    assert kv.counters.evictions_dropped == 2
    kv.check_integrity([again])


@pytest.mark.parametrize("host", [0, 4])
def test_no_prefix_cache_leaves_nothing_behind(host: int) -> None:
    kv = manager(host=host, prefix_cache=False)
    kv.release(computed(kv, [*range(1, 13)]))
    assert kv.device.num_cached == 0
    assert kv.host.num_cached == 0
