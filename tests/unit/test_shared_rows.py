"""Which rows share their first blocks, and how a step's batch says so."""

from __future__ import annotations

import random

import numpy as np
import torch

from halyard.hal.types import SharedRows
from halyard.runtime.batcher import Batcher
from halyard.runtime.config import SchedulerConfig
from halyard.runtime.plan import StepOutput
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.scheduler import Scheduler
from halyard.runtime.shared_rows import filled_up, find_shared_rows


def test_groups_tiles_and_what_is_left_alone() -> None:
    shared = np.arange(100, 132, dtype=np.int32)  # 32 blocks of 16: 512 keys
    tables = np.zeros((26, 40), np.int32)
    for row in range(20):
        tables[row, :32] = shared
        tables[row, 32:] = 1000 + 10 * row + np.arange(8)
    tables[5, 31] = 7  # one parts a block earlier: so does the group
    tables[20:24] = np.arange(2000, 2160).reshape(4, 40)  # nothing in common
    tables[24:, :32] = 500 + np.arange(32)  # a pair: too few
    starts = np.full(26, 600, np.int64)
    found = find_shared_rows(tables, starts, 16)
    assert found is not None
    assert [len(array) for array in found] == [2 + 16, 2 + 16, 26]
    assert [len(array) for array in filled_up(found, 33)] == [4 + 16, 4 + 16, 33]
    found = filled_up(found, 32)
    tile_rows, tile_keys, row_keys = found
    assert tile_rows.shape == (2 + 16, SharedRows.WIDTH)
    assert tile_keys.tolist() == [496, 496, *[0] * 16]
    assert sorted(tile_rows[tile_rows >= 0].tolist()) == list(range(20))
    assert row_keys.tolist() == [496] * 20 + [0] * 12
    # Only blocks that are full before the step count.
    short = starts.copy()
    short[3] = 495
    assert find_shared_rows(tables, short, 16)[2].max() == 30 * 16  # type: ignore[index]


def test_no_gain_no_sharing() -> None:
    tables = np.tile(np.arange(64, dtype=np.int32), (6, 1))
    few = np.full(6, 200, np.int64)  # 192 keys in common
    assert find_shared_rows(tables, few, 16) is None
    tables[:, 16:] += 100 * np.arange(6, dtype=np.int32)[:, None]
    long = np.full(6, 64 * 16 - 1, np.int64)
    assert find_shared_rows(tables, long, 16) is not None  # 256 of 1023 keys, five times
    tables[3:, 0] += 5000
    assert find_shared_rows(tables, long, 16) is None  # two threes


def test_batches_of_the_scheduler_say_what_their_rows_share() -> None:
    """Random prompts over two prefixes: every shared key is in the same slot of all rows' tables."""
    rng = random.Random(4)
    scheduler = Scheduler(
        SchedulerConfig(num_blocks=600, max_model_len=640, max_num_sequences=40,
                        max_batched_tokens=2048)
    )  # fmt: skip
    prefixes = [[rng.randrange(1, 999) for _ in range(400)] for _ in range(2)]
    for number in range(40):
        prompt = (*prefixes[number % 2], *[number + 1] * rng.randrange(1, 60))
        params = SamplingParams(max_tokens=rng.randrange(4, 60), ignore_eos=True)
        scheduler.add(Request(str(number), prompt, params, params.max_tokens or 1,
                              arrival_time=float(number)))  # fmt: skip
    batcher = Batcher(16, 40, share=True)
    seen = paired = 0
    while scheduler.has_work():
        plan = scheduler.schedule()
        assert plan is not None
        batch = batcher.pack(plan).put(torch.device("cpu")).batch
        if batch.shared is not None:
            seen += 1
            tables, lengths = batch.block_tables, batch.seq_lens
            keys = batch.shared.row_keys
            assert (keys < lengths).all()
            assert (keys % 16 == 0).all()
            listed = []
            for rows, count in zip(
                batch.shared.tile_rows.tolist(), batch.shared.tile_keys.tolist(), strict=True
            ):
                own = [row for row in rows if row >= 0]
                assert bool(own) == bool(count)
                listed += own
                for row in own:
                    assert keys[row] == count
                    assert torch.equal(tables[row, : count // 16], tables[own[0], : count // 16])
            assert sorted(listed) == torch.nonzero(keys)[:, 0].tolist()
            pairs = batch.shared.tile_keys.view(-1, 2)
            for number, (one, two) in enumerate(pairs.tolist()):
                assert two in (0, one)  # the second of a pair shares what the first does
                if two:
                    rows = batch.shared.tile_rows[2 * number : 2 * number + 2, 0].long()
                    assert torch.equal(*tables[rows, : one // 16])
                    paired += 1
        nothing = (None,) * len(plan.rows)
        tokens = tuple((7,) * row.num_samples for row in plan.rows)
        scheduler.commit(plan, StepOutput(tokens, nothing, nothing))
    assert seen > 10
    assert paired > 0
