"""Traced, fused, split and run on the reference kernels, every family gives Hugging Face's logits."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tiny_models import SERVED, tiny_model
from tiny_programs import build_tiny

from halyard.compiler.cache import ArtefactCache
from halyard.compiler.graphs.eager import EagerCompiler
from halyard.compiler.program import Program, UnboundProgram
from halyard.compiler.segments import SegmentCall
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.reference.kernels import ReferenceKernels
from halyard.hal.types import AttentionLayer, KVPool, StepBatch
from halyard.models.spec import ModelSpec

BLOCK = 4
CASES: dict[str, tuple[object, Program, int]] = {}


@cache
def unbound_of(family: str) -> UnboundProgram:
    """A tiny model's program, made once, and as a later start of a server has it: read from disk."""
    compiler, info = EagerCompiler(), CpuDevice().info
    with TemporaryDirectory() as folder:
        kept = ArtefactCache(Path(folder))
        assert kept.store(family, build_tiny(family, compiler), compiler), f"{family} is not kept"
        found = kept.load(family, compiler, info)
    assert found is not None
    assert found.from_cache
    return found


def program_of(family: str, kernels: ReferenceKernels | None = None) -> tuple[object, Program, int]:
    """(Hugging Face model, program, unique segments), made once for the reference's own kernels."""
    if family not in CASES or kernels is not None:
        model, unbound, device = tiny_model(family), unbound_of(family), CpuDevice()
        state = {k: v for k, v in model.state_dict(keep_vars=False).items() if k in unbound.weights}
        assert set(state) == set(unbound.weights)
        used = kernels or ReferenceKernels(device)
        program = unbound.bind(dict(state), used)
        layout = used.layout(ModelSpec.from_hf(model.config).kv_spec("float32", BLOCK))
        pool = device.allocate_kv(layout, 64, host=False)
        pool.data.fill_(float("nan"))  # whoever reads a slot nobody wrote shows it
        program.set_pool(pool)
        unique = len({c.segment for c in unbound.calls if isinstance(c, SegmentCall)})
        if kernels is not None:
            return model, program, unique
        CASES[family] = (model, program, unique)
    return CASES[family]


class Batch:
    """Sequences with blocks handed out in random order."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences
        self.done = [0] * len(sequences)
        ids = list(range(64))
        random.Random(0).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(-(-len(s) // BLOCK))] for s in sequences]

    def step(
        self, program: Program, counts: dict[int, int], wanted: list[int] | None = None
    ) -> dict[int, torch.Tensor]:
        """Compute `counts[sequence]` more tokens; logits of every token computed, or of `wanted`."""
        rows = list(counts)
        tokens, positions, slots, starts = [], [], [], [0]
        for row in rows:
            first = self.done[row]
            for position in range(first, first + counts[row]):
                tokens.append(self.sequences[row][position])
                positions.append(position)
                slots.append(self.tables[row][position // BLOCK] * BLOCK + position % BLOCK)
            self.done[row] = first + counts[row]
            starts.append(len(tokens))
        width = max(len(self.tables[row]) for row in rows)
        batch = StepBatch(
            num_tokens=len(tokens),
            num_rows=len(rows),
            max_query_len=max(counts.values()),
            max_seq_len=max(self.done[row] for row in rows),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(
                [self.tables[row] + [-1] * (width - len(self.tables[row])) for row in rows],
                dtype=torch.int32,
            ),
            seq_lens=torch.tensor([self.done[row] for row in rows], dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
        )
        if wanted is not None:
            return {0: program.run(torch.tensor(tokens), torch.tensor(wanted), batch)}
        logits = program.run(torch.tensor(tokens), torch.arange(len(tokens)), batch)
        return {row: logits[starts[i] : starts[i + 1]] for i, row in enumerate(rows)}


def check(family: str, program: Program) -> None:
    """Prefill, a mixed step, as many rows as tokens, and one token alone: Hugging Face's logits."""
    model = tiny_model(family)
    sequences = [[5 * i % 128 for i in range(20)], [7 * i % 128 for i in range(11)]]
    batch = Batch(sequences)
    got: list[list[torch.Tensor]] = [[], []]
    for counts in ({0: 9, 1: 8}, {0: 8, 1: 1}, {0: 1, 1: 1}, {0: 1}, {1: 1}, {0: 1}):
        for row, logits in batch.step(program, counts).items():
            got[row].append(logits)
    with torch.no_grad():
        for sequence, found in zip(sequences, got, strict=True):
            expected = model(torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SERVED)
def test_logits(family: str) -> None:
    model, program, unique = program_of(family)
    assert unique <= 5
    generator = random.Random(1)
    sequences = [[generator.randrange(128) for _ in range(n)] for n in (23, 9, 17)]
    batch = Batch(sequences)
    got: list[list[torch.Tensor]] = [[], [], []]
    for counts in (
        {0: 10, 1: 8},  # packed prefill
        {0: 6, 1: 1, 2: 5},  # chunked prefill beside a decode, and a new one
        {0: 6, 2: 11},  # chunks
        {0: 1, 2: 1},  # decode, as many rows as tokens
    ):
        for row, logits in batch.step(program, counts).items():
            got[row].append(logits)
    with torch.no_grad():
        for row, sequence in enumerate(sequences):
            length = batch.done[row]
            expected = model(torch.tensor([sequence[:length]])).logits[0]  # type: ignore[operator]
            found = torch.cat(got[row])
            assert torch.equal(found.argmax(-1), expected.argmax(-1))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_token_runs_on_the_same_program() -> None:
    model, program, _ = program_of("llama")
    batch = Batch([[5, 6]])
    first = batch.step(program, {0: 1})[0]
    second = batch.step(program, {0: 1})[0]
    expected = model(torch.tensor([[5, 6]])).logits[0]  # type: ignore[operator]
    torch.testing.assert_close(torch.cat([first, second]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "mixtral"])
def test_alike_layers_share_a_segment(family: str) -> None:
    _, _, unique = program_of(family)
    assert unique == 3


@pytest.mark.parametrize("family", SERVED)
def test_few_wanted_tokens_go_on_alone_behind_the_last_attention(family: str) -> None:
    _, program, _ = program_of(family)
    if family == "deepseek-v3":  # its routing regroups tokens: all of them go on
        assert program._token_axes is None
        return
    assert program._token_axes is not None, "its last segment should work token by token"
    sequences = [[(7 * i + 3) % 128 for i in range(21)]]
    rows_seen = []
    last = program._steps[-1]
    ran = last.run

    def watched(*inputs: torch.Tensor) -> object:
        rows_seen.append(max(x.shape[axis] for x, axis in zip(inputs, program._token_axes or (), strict=True)
                             if axis >= 0))  # fmt: skip
        return ran(*inputs)

    object.__setattr__(last, "run", watched)
    try:
        everything = Batch(sequences).step(program, {0: 21})[0]
        some = Batch(sequences).step(program, {0: 21}, wanted=[2, 20])[0]
    finally:
        object.__setattr__(last, "run", ran)
    assert rows_seen == [21, 2]
    torch.testing.assert_close(some, everything[[2, 20]], atol=1e-5, rtol=1e-5)


class _Writing(ReferenceKernels):
    """The reference, which offers to write alone; notes how many tokens attend in each layer."""

    writes_alone = True

    def __init__(self, device: CpuDevice) -> None:
        super().__init__(device)
        self.attended: list[int] = []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pool: KVPool,
        layer: AttentionLayer, batch: StepBatch,
    ) -> torch.Tensor:  # fmt: skip
        self.attended.append(len(q))
        return super().attend(q, k, v, pool, layer, batch)

    def write(
        self, k: torch.Tensor, v: torch.Tensor, pool: KVPool, layer: AttentionLayer,
        batch: StepBatch,
    ) -> None:  # fmt: skip
        q = k.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1)
        super().attend(q, k, v, pool, layer, batch)


@pytest.mark.parametrize("family", SERVED)
def test_few_wanted_tokens_attend_alone_in_the_last_layer(family: str) -> None:
    """A packed step whose rows are a prompt's chunk behind others, one that ends, and a decode."""
    kernels = _Writing(CpuDevice())
    model, program, _ = program_of(family, kernels)
    by_token = family != "deepseek-v3"
    generator = random.Random(2)
    sequences = [[generator.randrange(128) for _ in range(n)] for n in (30, 21, 12)]
    batch = Batch(sequences)
    batch.step(program, {0: 9, 1: 4, 2: 11})
    kernels.attended.clear()
    # Wanted: of the first row two tokens, of the second its last, of the third its only one.
    found = batch.step(program, {0: 17, 1: 17, 2: 1}, wanted=[3, 16, 33, 34])[0]
    assert kernels.attended == [35] * (len(kernels.attended) - 1) + [4 if by_token else 35]
    places = [(0, 12), (0, 25), (1, 20), (2, 11)]
    with torch.no_grad():
        for logits, (row, position) in zip(found, places, strict=True):
            tokens = torch.tensor([sequences[row][: position + 1]])
            expected = model(tokens).logits[0, -1]  # type: ignore[operator]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    # What the step wrote is there for the next one.
    after = batch.step(program, {0: 1})[0]
    with torch.no_grad():
        expected = model(torch.tensor([sequences[0][:27]])).logits[0, -1:]  # type: ignore[operator]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


class _OfAnotherMind(ReferenceKernels):
    """Kernels from before `write` meant anything, or for which it means something else."""

    def write(self, path: str) -> None:
        raise AssertionError("nobody asked for that")


def test_a_method_called_write_is_no_offer() -> None:
    _, program, _ = program_of("llama", _OfAnotherMind(CpuDevice()))
    sequence = [5 * i % 128 for i in range(20)]
    everything = Batch([sequence]).step(program, {0: 20})[0]
    last = Batch([sequence]).step(program, {0: 20}, wanted=[19])[0]
    torch.testing.assert_close(last, everything[[19]], atol=1e-5, rtol=1e-5)
