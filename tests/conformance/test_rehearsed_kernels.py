"""On a Hopper, steps launch no kernel that the rehearsal hasn't compiled: nobody waits for a compiler.

Triton's own specialisation decides what is another kernel; nothing is compiled or launched here.
"""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from halyard.compiler.captured import CapturedProgram
from halyard.hal.kernels.triton import experts, gated, largest, rotary, skinny
from halyard.hal.kernels.triton.kernels import TritonKernels
from halyard.hal.types import AttentionLayer, BlockMove, KVPool, KVSpec, Probe, StepBatch
from halyard.runtime.executor import Executor
from halyard.runtime.plan import PlanRow, StepPlan
from halyard.runtime.rehearsal import Rehearsal
from halyard.runtime.request import Request, SamplingParams
from halyard.runtime.sampler import Sampler
from halyard.runtime.sequence import Sequence, SequenceStatus

BLOCKS, SIZE, CORES = 64, 16, 132
VOCAB = 128_256  # a greedy row may be split over as many programs as there are
SHAPES = {  # heads, kv heads, head dim, hidden, inner
    "1b": (32, 8, 64, 2048, 8192),
    "8b": (32, 8, 128, 4096, 14336),
    "30b-a3b": (32, 4, 128, 2048, 768),
    "20b-a4b": (64, 8, 64, 2880, 2880),
    "8x7b": (32, 8, 128, 4096, 14336),
    "16b-a3b": (16, 16, 128, 2048, 1408),
}
EXPERTS = {
    "30b-a3b": (128, 8),
    "20b-a4b": (32, 4),
    "8x7b": (8, 2),
    "16b-a3b": (64, 6),
}  # of a token


class _Driver:
    """Of a Hopper that is only asked what it is."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Device:
    torch_device = torch.device("cpu")
    info = SimpleNamespace(kind="cuda", arch="sm_90", num_cores=CORES)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    def synchronize(self) -> None:
        pass

    def memory(self) -> Any:
        return SimpleNamespace(free=1 << 36, total=1 << 36)


class _Program:
    """One layer and the logits, by the operators that a GPU's program calls."""

    vocab_size = VOCAB
    weight_bytes = 0

    def __init__(self, shape: str, kernels: TritonKernels, window: int) -> None:
        self.heads, self.kv_heads, self.dim, self.hidden, inner = SHAPES[shape]
        self.kernels, heads = kernels, self.heads + 2 * self.kv_heads
        self.layer = AttentionLayer(
            0, self.heads, self.kv_heads, self.dim, self.dim**-0.5, window=window
        )
        sides = {"qkv": (heads * self.dim, self.hidden), "o": (self.hidden, self.heads * self.dim),
                 "gate": (2 * inner, self.hidden), "down": (self.hidden, inner),
                 "logits": (VOCAB, self.hidden)}  # fmt: skip
        self.experts = EXPERTS.get(shape)
        if self.experts is not None:  # of these as many, which nobody touches
            sides["gate"], sides["down"] = (
                (self.experts[0], *sides[name]) for name in ("gate", "down")
            )
        self.weights = {name: self.empty(*side) for name, side in sides.items()}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def set_pool(self, pool: KVPool) -> None:
        self.pool = pool

    def run(self, ids: Tensor, indices: Tensor, batch: StepBatch) -> Tensor:
        count, weights = batch.num_tokens, self.weights
        x, angles = self.empty(count, self.hidden), self.empty(count, self.dim)
        few: Any = skinny._by_few_rows  # what the operators call on a GPU
        few(x, weights["qkv"])
        parts = self.empty(count, self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotary.rotate(q, k, angles, angles)
        attended = self.kernels.attend(q, k, v, self.pool, self.layer, batch)
        few(attended.view(count, -1), weights["o"], residual=x, out=x)
        if self.experts is not None:
            _, chosen = largest.largest_of_rows(self.empty(count, self.experts[0]), self.experts[1])
            scales = self.empty(*chosen.shape)
            experts.expert_parts(x, weights["gate"], weights["down"], chosen, scales, "silu")
        else:
            gate: Any = gated._gated_product_gpu
            few(gate(x, weights["gate"], False), weights["down"], residual=x, out=x)
        few(x[indices], weights["logits"])
        return self.empty(len(indices), VOCAB)


class _Wanted:
    """Kernels in the place of Triton's compiler: the step that each was first wanted for."""

    def __init__(self) -> None:
        self.step = ""
        self.first: dict[tuple[str, str], str] = {}  # by name and specialisation

    def __call__(self, *, key: str, fn: Any, **_: Any) -> bool:
        self.first.setdefault((fn.name.split(".")[-1], key), self.step)
        return True  # don't compile it


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> _Wanted:
    wanted = _Wanted()
    run = triton.runtime.jit.JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", only_compile)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", wanted)
    monkeypatch.setattr(TritonKernels, "probe", classmethod(lambda *_: Probe(True, ())))
    linears = skinny.SkinnyLinears()
    monkeypatch.setattr(skinny, "_on", lambda device: (linears, CORES, "sm_90"))
    monkeypatch.setattr(gated, "_cores", lambda device: CORES)
    monkeypatch.setattr(experts, "arch_of", lambda device: "sm_90")

    def product(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        skinny._by_few_rows(x, weight)
        return x.new_empty((x.shape[0], weight.shape[0]))

    monkeypatch.setattr(gated, "skinny_linear", product)
    return wanted


def _plan(
    rows: list[tuple[int, int]], drawn: bool, shared: bool, changed: int, forked: bool
) -> StepPlan:
    """Rows of (keys that are there, tokens that come), so many of them with biases or penalties; with
    `forked` the last one begins three answers."""
    planned = []
    temperature = 1.0 if drawn else 0.0
    for number, (start, count) in enumerate(rows):
        params = SamplingParams(temperature=temperature)
        if number < changed:
            repetition = 1.2 if number == 1 else 1.0
            params = SamplingParams(temperature=temperature, repetition_penalty=repetition,
                                    logit_bias={1: 2.0})  # fmt: skip
        sequence = Sequence.first_of(Request(f"{number}", (0,) * (start + count), params, 1), -1)
        sequence.status = SequenceStatus.RUNNING
        block = 0 if shared else number % BLOCKS
        sequence.block_ids = array("i", [block] * -(-(start + count) // SIZE))
        answers = 3 if forked and number == len(rows) - 1 else 1
        planned.append(PlanRow(sequence, start, count, answers))
    counts = [count for _, count in rows]
    return StepPlan(
        0, tuple(planned), sum(counts), len(rows), sum(counts) if max(counts) > 1 else 0
    )


def _steps(most_rows: int, most_tokens: int, most_keys: int) -> Iterator[tuple[str, Any]]:
    """What serving comes to: a request beside many long ones first, then whatever chance brings."""
    for others in (1, 8, 40, most_rows - 1):
        for prompt in (5, 60, 900):
            yield f"{others} + {prompt}", [(700, 1)] * others + [(0, prompt)]
    chance = random.Random(7)
    for number in range(150):
        kind = chance.choice(["decode", "shared", "mixed", "prompts"])
        count = min(most_rows, chance.choice([1, 2, 3, 5, 8, 16, 17, 64, 100, 128, 129, 256, 512]))
        top = min(most_keys - 1, chance.choice([30, 250, 300, 600, 1100, 2100, 4200, most_keys]))
        left, rows = most_tokens, []
        for _ in range(count):
            if kind == "shared":
                rows.append((top - 1, 1))
            elif kind == "decode" or (kind == "mixed" and chance.random() < 0.7):
                rows.append((chance.randrange(top), 1))
            else:
                tokens = min(chance.choice([chance.randrange(2, 40), top]), left - most_rows, top)
                if tokens < 1:
                    break
                left -= tokens
                rows.append((SIZE * chance.randrange(max(1, (top - tokens) // SIZE)), tokens))
        if rows:
            yield f"{number}: {kind}, {len(rows)} rows, {top} keys", rows


@pytest.mark.parametrize(
    ("shape", "window", "most_rows", "most_tokens", "most_keys"),
    [("1b", 0, 256, 8192, 8192), ("8b", 0, 256, 8192, 8192), ("8b", 0, 512, 2048, 20000),
     ("8b", 1024, 64, 2048, 4096), *((name, 0, 64, 2048, 4096) for name in EXPERTS)],
)  # fmt: skip
def test_no_step_waits_for_a_compiler(
    wanted: _Wanted, shape: str, window: int, most_rows: int, most_tokens: int, most_keys: int
) -> None:
    device: Any = _Device()
    kernels = TritonKernels(device)
    program: Any = _Program(shape, kernels, window)
    captured = CapturedProgram(program, device, most_rows, most_keys // SIZE, SIZE)
    spec = KVSpec(1, program.kv_heads, program.dim, "bfloat16", SIZE)
    layout = kernels.layout(spec)
    data = torch.empty((1, BLOCKS, *layout.block_shape), dtype=torch.bfloat16)
    executor = Executor(
        device, kernels, captured, KVPool(layout, BLOCKS, False, data), None,
        Sampler(VOCAB, kernels), most_keys // SIZE, share=True,
    )  # fmt: skip
    rehearsal = Rehearsal(executor, most_tokens)
    assert rehearsal.one()
    ahead = set(wanted.first)
    assert {"paged_decode_kernel", "draw_kernel", "rotate_kernel"} <= {name for name, _ in ahead}
    chance = random.Random(8)
    for wanted.step, rows in _steps(most_rows, most_tokens, most_keys):
        drawn, shared = chance.random() < 0.5, "shared" in wanted.step
        changed = chance.choice([0, 0, 1, len(rows) // 2, len(rows)])
        plan = _plan(rows, drawn, shared, changed, chance.random() < 0.2)
        packed = executor.batcher.pack(plan)
        inputs = packed.put(device.torch_device)
        logits = captured.run(inputs.input_ids, inputs.logit_indices, inputs.batch)
        logits = logits[: packed.num_logits]
        executor.sampler.draw(logits, executor.sampler.prepare(packed.samples))
    wanted.step = "a copy"
    executor.move(copies=[BlockMove(3, 5), BlockMove(4, 6)])
    late = [(kernel[0], step) for kernel, step in wanted.first.items() if kernel not in ahead]
    assert not late
