"""What tests of graph compilers share: a tiny model bound to a compiled program, and its steps."""

from __future__ import annotations

import random
from typing import Any

import torch
from test_program_matches_hf import Batch
from tiny_models import tiny_model

from halyard.compiler.program import Program, UnboundProgram
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.reference.kernels import ReferenceKernels
from halyard.models.spec import ModelSpec

DEVICE = CpuDevice()


def bind(family: str, unbound: UnboundProgram, seed: int = 0) -> tuple[Any, Program]:
    """(Hugging Face model, program)"""
    model = tiny_model(family, seed)
    spec = ModelSpec.from_hf(model.config)
    kernels = ReferenceKernels(DEVICE)
    state = model.state_dict()
    program = unbound.bind({name: state[name].clone() for name in unbound.weights}, kernels)
    pool = DEVICE.allocate_kv(kernels.layout(spec.kv_spec("float32", 4)), 64, host=False)
    pool.data.fill_(float("nan"))
    program.set_pool(pool)
    return model, program


def check(model: Any, program: Program) -> None:
    """Packed prefill, chunks beside decodes, decode of as many rows as tokens, one token alone."""
    generator = random.Random(1)
    sequences = [[generator.randrange(128) for _ in range(n)] for n in (23, 9, 17)]
    batch = Batch(sequences)
    got: list[list[torch.Tensor]] = [[], [], []]
    steps: tuple[dict[int, int], ...] = (
        {0: 10, 1: 8}, {0: 6, 1: 1, 2: 5}, {0: 4, 2: 9}, {0: 1, 2: 1}, {0: 1}, {2: 1},
    )  # fmt: skip
    for counts in steps:
        for row, logits in batch.step(program, counts).items():
            got[row].append(logits)
    with torch.no_grad():
        for row, sequence in enumerate(sequences):
            expected = model(torch.tensor([sequence[: batch.done[row]]])).logits[0]
            found = torch.cat(got[row])
            assert torch.equal(found.argmax(-1), expected.argmax(-1))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
