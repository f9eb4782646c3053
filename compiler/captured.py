"""Steps recorded once and replayed: on a GPU a step's launches then cost one call.

A decode step is recorded for a number of rows and a reach of keys, both rounded up. A recording holds
everybody up for as long as dozens of steps take, so where a wider one is there it is replayed until
what it computes in vain comes near to that; where none is, the step that comes is recorded. Inputs
lie in one buffer, which a step's inputs are copied to in one piece; rows that only fill up a recording
have no slot and one key, and nobody reads what they get.

Steps with prompts in them are recorded up to a number of tokens, behind which the device takes longer
than most hosts' launches: larger ones are recorded on a host that was seen to be slower, ahead or when the
device waited for their like before. Where a wider one was recorded ahead that costs the device little more,
that one is replayed; else there is a recording when a shape comes the third time, or sooner while nobody
waits. Rows that fill these up have no tokens, and tokens that do belong to no row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from halyard.compiler.program import Program
from halyard.hal import fallbacks
from halyard.hal.contract import Device, RecordingDevice
from halyard.hal.types import KVPool, StepBatch

__all__ = ["CapturedProgram", "room_to_record", "row_buckets"]

_SHORTEST_REACH = 512  # keys
_MIXED_TOKENS = (*range(32, 128, 32), *range(128, 512, 64), *range(512, 1024, 128),
                 *range(1024, 2049, 256))  # fmt: skip
_LARGE = 0.85  # tokens of a larger step that is recorded, as a part of the next one's
_MIXED_ROWS = (8, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
_MOST_MIXED = 96  # recordings of steps with prompts: each takes a few MiB
_MOST_AHEAD = 48  # of them, those that may be recorded while nobody waits
# A recording takes 45 ms, in which nobody gets a token; kernel by kernel such a step takes some more than replayed.
_OFTEN = 3
_OFTEN_REPLAYED = 64  # likewise, where a wider one is replayed
# What a step may be filled up to: tokens that the device reads its weights for anyway, and a part of its own.
_FREE_TOKENS = 256
_PART_IN_VAIN = 0.25
# Rows that a wider recording computes for nobody until recording what fits would have taken less: in
# one piece, and together where other numbers of rows come in between. A longer reach alone counts little.
_SPENT_AT_ONCE = 1024
_SPENT = 16384
_LONGER_REACH = 2
# Decode steps that are worth recording before they come: up to so many rows and keys.
_ROWS_AHEAD = 256
_KEYS_AHEAD = 2048

_SPARE = 0.03  # of the device's memory, and at least:
_SPARE_BYTES = 512 << 20  # recordings that no step needs take none of the last

_Key = tuple[int, int, int, bool, bool]  # tokens, rows, keys, with prompts, shares blocks


def _decode_key(rows: int, keys: int, shares: bool) -> _Key:
    return rows, rows, keys, False, shares


def room_to_record(device: Device) -> bool:
    """Whether so much memory is free that what could do without a recording may have one."""
    memory = device.memory()
    return memory.free >= max(_SPARE_BYTES, _SPARE * memory.total)


def row_buckets(max_rows: int) -> list[int]:
    """Row counts that are recorded: close together where padding would cost most."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32),
             *range(512, max_rows + 64, 64)]  # fmt: skip
    return sorted({*(n for n in steps if n < max_rows), max_rows})


def _large_tokens(max_tokens: int) -> list[int]:
    """Token counts of steps with prompts that are recorded ahead alone."""
    sizes = []
    while max_tokens > _MIXED_TOKENS[-1]:
        sizes.append(max_tokens)
        max_tokens = int(_LARGE * max_tokens) // 256 * 256
    return sizes[::-1]


class CapturedProgram:
    """A Program that replays its decode steps where the device can record them.

    Args:
        max_rows: most rows of a step.
        max_blocks: most blocks of a sequence.
        max_tokens: most tokens of a step.
    """

    def __init__(
        self,
        program: Program,
        device: Device,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        max_tokens: int = _MIXED_TOKENS[-1],
    ) -> None:
        self.vocab_size = program.vocab_size
        self.weight_bytes = program.weight_bytes
        self._program = program
        self._device = device
        self._block_size = block_size
        self.max_keys = max_blocks * block_size
        self.max_rows = max_rows
        self._buckets = row_buckets(max_rows)
        self._mixed_rows = [*(rows for rows in _MIXED_ROWS if rows < max_rows), max_rows]
        self._mixed_tokens = [*_MIXED_TOKENS, *_large_tokens(max_tokens)]
        self._replays: dict[_Key, tuple[Callable[[], None], Tensor]] = {}
        self._seen: Counter[_Key] = Counter()  # steps with prompts, until they are recorded
        self._roomy: set[_Key] = set()  # steps with prompts that stand in for smaller ones
        self._due: set[_Key] = set()  # of those seen, those that are recorded when they come next
        # Rows in vain by the decode step that would have fitted: ever, and since other steps came.
        self._spent: Counter[_Key] = Counter()
        self._lately: tuple[_Key | None, int] = (None, 0)
        self._large: _Key | None = None  # the step at hand, if large and launched kernel by kernel
        self.num_mixed = 0  # recordings of steps with prompts
        self._enabled = True
        # Of a row: int64 and int32 columns, what it shares, a table; of a token that is no row's
        # only one: int64 columns; and what alignment takes.
        size = max_rows * (80 + 4 * max_blocks) + self._mixed_tokens[-1] * 24 + (1 << 13)
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)

    def set_pool(self, pool: KVPool) -> None:
        """Where keys and values live; recordings of another pool are void."""
        self._program.set_pool(pool)
        self._forget()

    def decode_shape(
        self, num_rows: int, max_seq_len: int, shares: bool = False
    ) -> tuple[int, int] | None:
        """(rows, keys) that inputs in `buffer` must be filled up to. None: give them as they are.

        Args:
            shares: the step comes with StepBatch.shared.
        """
        self._large = None
        fitting = self.fitting_shape(num_rows, max_seq_len)
        if fitting is None:
            return None
        key = _decode_key(*fitting, shares)
        if key in self._replays:
            return fitting
        wider = self._wider(*fitting, shares)
        if wider is None:
            return fitting
        vain = max(wider[0] - fitting[0], _LONGER_REACH)
        last, spent = self._lately
        self._lately = (key, vain + (spent if key == last else 0))
        self._spent[key] += vain
        worth_it = self._lately[1] > _SPENT_AT_ONCE or self._spent[key] > _SPENT
        return fitting if worth_it else wider

    def fitting_shape(self, num_rows: int, max_seq_len: int) -> tuple[int, int] | None:
        """As decode_shape, but the shape that fits best, recorded or not."""
        if not self._enabled or num_rows > self._buckets[-1]:
            return None
        return self._buckets[bisect_left(self._buckets, num_rows)], self._reach(max_seq_len)

    def _wider(self, rows: int, keys: int, shares: bool) -> tuple[int, int] | None:
        """The least decode step that is recorded and has room for that one."""
        room = [
            (others, reach)
            for _, others, reach, mixed, shared in self._replays
            if not mixed and shared == shares and others >= rows and reach >= keys
        ]
        return min(room, default=None)

    def mixed_shape(
        self, num_tokens: int, num_rows: int, num_logits: int, max_seq_len: int
    ) -> tuple[int, int, int] | None:
        """(tokens, rows = logits, keys) that the inputs of a step with prompts must be filled up to.
        None: give them as they are."""
        self._large = None
        fitting = self._filled_up(num_tokens, num_rows, num_logits, max_seq_len)
        if fitting is None:
            return None
        if num_rows < 2:  # nobody waits for the rest of a lone row's step: replayed, never recorded
            return self._wider_mixed(*fitting)
        key = (*fitting, True, False)
        if key in self._replays:
            return fitting
        wider = self._wider_mixed(*fitting)
        if fitting[0] > _MIXED_TOKENS[-1]:
            if wider is not None or key in self._due:
                return wider or fitting
            self._large = key
            return None
        often = self._seen[key] >= _OFTEN_REPLAYED and self.num_mixed < _MOST_MIXED
        if wider is None or often:
            return fitting
        self._seen[key] += 1
        return wider

    def _wider_mixed(self, tokens: int, rows: int, keys: int) -> tuple[int, int, int] | None:
        """The least step with prompts that was recorded for others, too, has room for that one and isn't
        much more work."""
        most = max(_FREE_TOKENS, int(tokens * (1 + _PART_IN_VAIN)))
        room = [
            (count, others, reach)
            for count, others, reach, *_ in self._roomy & self._replays.keys()
            if tokens <= count <= most and others >= rows and reach >= keys
        ]
        return min(room, default=None)

    def fitting_mixed_shape(
        self, num_tokens: int, num_rows: int, num_logits: int, max_seq_len: int
    ) -> tuple[int, int, int] | None:
        """As mixed_shape, but the shape that fits best, recorded or not."""
        if num_rows < 2:
            return None
        return self._filled_up(num_tokens, num_rows, num_logits, max_seq_len)

    def _filled_up(
        self, num_tokens: int, num_rows: int, num_logits: int, max_seq_len: int
    ) -> tuple[int, int, int] | None:
        most = max(num_rows, num_logits)
        sizes = self._mixed_tokens
        if not self._enabled or num_tokens > sizes[-1] or most > self._mixed_rows[-1]:
            return None
        tokens = sizes[bisect_left(sizes, num_tokens)]
        rows = self._mixed_rows[bisect_left(self._mixed_rows, most)]
        return max(tokens, rows), rows, self._reach(max_seq_len)

    def first_decode_shapes(self) -> list[tuple[int, int]]:
        """(rows, keys) of decode steps to record before any comes.

        A lone row is first, whom a wider recording would cost most; then what has room for all others,
        with half as many rows each time.
        """
        shapes, number = [(1, self._reach(1))], max(self._rows_ahead(self._buckets))
        while number > 1:
            rows = self._buckets[bisect_left(self._buckets, number)]
            shapes.append((rows, self._reach(_KEYS_AHEAD)))
            number //= 2
        return list(dict.fromkeys(shapes))

    def decode_shapes(self) -> list[tuple[int, int]]:
        """(rows, keys) of all decode steps that are worth recording before they come, the first ones first."""
        reaches = sorted({self._reach(keys) for keys in (_SHORTEST_REACH, 1024, _KEYS_AHEAD)})
        shapes = [(rows, keys) for keys in reaches for rows in self._rows_ahead(self._buckets)]
        return list(dict.fromkeys([*self.first_decode_shapes(), *shapes]))

    def mixed_shapes(self) -> list[tuple[int, int, int]]:
        """(tokens, rows, keys) of steps with prompts that are worth recording before any comes: between
        them they have room for all that don't have more rows or keys."""
        return self._ahead(_MIXED_TOKENS)

    def large_mixed_shapes(self) -> list[tuple[int, int, int]]:
        """Likewise those with more tokens, which are worth it where launches take long."""
        return self._ahead(self._mixed_tokens[len(_MIXED_TOKENS) :])

    def _ahead(self, tokens: Sequence[int]) -> list[tuple[int, int, int]]:
        rows, keys = max(self._rows_ahead(self._mixed_rows)), self._reach(_KEYS_AHEAD)
        least, most = max(rows, _FREE_TOKENS), rows * keys
        return [(n, rows, keys) for n in tokens if least <= n <= most and rows > 1]

    def _rows_ahead(self, buckets: list[int]) -> list[int]:
        return [rows for rows in buckets if rows <= _ROWS_AHEAD]

    def record_next(self, tokens: int, rows: int, keys: int) -> None:
        """The next step with prompts of that shape is recorded, and replayed for smaller ones, too."""
        key = (tokens, rows, keys, True, False)
        self._due.add(key)
        self._roomy.add(key)

    def launched(self, waited: bool) -> None:
        """The step whose shape was asked for last is launched.

        Args:
            waited: the device had done all before it by then, and waited for the host. Large steps whose
                like it often waited for are recorded.
        """
        key, self._large = self._large, None
        if key is None or not waited:
            return
        self._seen[key] += 1
        often = self._seen[key] >= _OFTEN - 1 and self.num_mixed < _MOST_MIXED
        if often and room_to_record(self._device):
            self._due.add(key)

    def due(self) -> tuple[int, int, int] | None:
        """(tokens, rows, keys) of a step with prompts that came and isn't recorded: the next such step will
        be. The most frequent first, each of them once."""
        if not self._enabled or self.num_mixed >= _MOST_AHEAD:
            return None
        for key, _ in self._seen.most_common():
            tokens, rows, keys, _, shares = key
            if key not in self._replays and key not in self._due and not shares:
                self._due.add(key)
                return tokens, rows, keys
        return None

    def move_weights(self, device: torch.device) -> None:
        """As Program.move_weights; recordings name the old places and are void."""
        self._forget()
        self._program.move_weights(device)

    def _forget(self) -> None:
        self._replays.clear()
        self._seen.clear()
        self._due.clear()
        self._roomy.clear()
        self._spent.clear()
        self._lately = (None, 0)
        self._large = None
        self.num_mixed = 0

    def _reach(self, max_seq_len: int) -> int:
        reach = _SHORTEST_REACH
        while reach < max_seq_len:
            reach *= 2
        return min(reach, self.max_keys)

    @torch.inference_mode()
    def run(self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch) -> Tensor:
        """As Program.run; inputs that lie in `buffer` are of a `decode_shape` or a `mixed_shape`.

        Equal shapes lie at equal places, so a recording finds its inputs. The logits are valid until
        the next call.
        """
        if batch.positions.data_ptr() != self.buffer.data_ptr() or not self._enabled:
            return self._program.run(input_ids, logit_indices, batch)
        mixed = batch.max_query_len > 1
        key = (batch.num_tokens, batch.num_rows, batch.max_seq_len, mixed, batch.shared is not None)
        recorded = self._replays.get(key)
        if recorded is None:
            if mixed and not self._worth_recording(key):
                return self._program.run(input_ids, logit_indices, batch)
            recorded = self._record(input_ids, logit_indices, batch)
            if recorded is None:
                return self._program.run(input_ids, logit_indices, batch)
            self._replays[key] = recorded
        replay, logits = recorded
        replay()
        return logits

    def _worth_recording(self, key: _Key) -> bool:
        """A recording costs as much as several steps: only for what comes again and again."""
        self._seen[key] += 1
        if self.num_mixed >= _MOST_MIXED or (self._seen[key] < _OFTEN and key not in self._due):
            return False
        self.num_mixed += 1
        return True

    def run_with_hidden(
        self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch
    ) -> tuple[Tensor, Tensor]:
        """As Program.run_with_hidden: never replayed, recordings keep no hidden states."""
        return self._program.run_with_hidden(input_ids, logit_indices, batch)

    def _record(
        self, input_ids: Tensor, logit_indices: Tensor, batch: StepBatch
    ) -> tuple[Callable[[], None], Tensor] | None:
        made: list[Tensor] = []

        def step() -> None:
            made.append(self._program.run(input_ids, logit_indices, batch))

        replay = self._device.capture(step)
        if replay is None:
            self._enabled = False
            fallbacks.note(
                "graph_capture",
                "decode steps are launched one kernel at a time: the device could not record one",
            )
            return None
        # Valid until the next call, so what another recording works in may lie there too: with 256 rows
        # these are 65 MiB each.
        logits = made.pop()
        if isinstance(self._device, RecordingDevice) and logits.is_contiguous():
            logits = self._device.unheld(logits)
        return replay, logits
