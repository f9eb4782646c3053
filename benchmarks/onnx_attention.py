"""Graph compilers on the CPU, one program each, the same native attention: a step of a small Llama.

Usage: python benchmarks/onnx_attention.py [--threads N] [--seconds S] [--graphs eager,onnxruntime]

Figures are milliseconds a step (the best of many, the compilers taking turns), and the ratio to
`onnxruntime` (above 1: onnxruntime is faster). float32; random weights: hidden size 512, 4 layers,
8 query heads over 2 kv heads of 64, vocabulary 8192.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halyard.compiler.build import build_program
from halyard.compiler.program import HeadShape, Program
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native.kernels import NativeKernels
from halyard.hal.registry import load_part
from halyard.hal.types import StepBatch
from halyard.models.adapter import build_meta_module
from halyard.models.spec import ModelSpec

BLOCK = 16
CONFIG = LlamaConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
)  # fmt: skip


def make_program(graph: str, device: CpuDevice, state: dict[str, torch.Tensor]) -> Program:
    """The model compiled by one graph compiler, with a pool of its own."""
    spec = ModelSpec.from_hf(CONFIG)
    model = build_meta_module(spec, "float32")
    unbound = build_program(
        model, model.buffers_by_name, load_part("graphs", graph)(), device.info, name="llama",
        windows=spec.windows, vocab_size=spec.vocab_size, dtype="float32",
        heads=HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim),
        torch_device=device.torch_device,
    )  # fmt: skip
    kernels = NativeKernels(device)
    program = unbound.bind({name: state[name].clone() for name in unbound.weights}, kernels)
    pool = device.allocate_kv(kernels.layout(spec.kv_spec("float32", BLOCK)), 320, host=False)
    pool.data.normal_()
    program.set_pool(pool)
    return program


def step(program: Program, rows: int, queries: int, context: int) -> Callable[[], torch.Tensor]:
    """One step: `rows` sequences that reach `context` tokens with `queries` new ones each."""
    per_row = -(-context // BLOCK)
    tables = torch.randperm(rows * per_row).to(torch.int32).view(rows, per_row)
    positions = torch.arange(context - queries, context).repeat(rows)
    row_of = torch.arange(rows).repeat_interleave(queries)
    batch = StepBatch(
        rows * queries, rows, queries, context, positions,
        tables[row_of, positions // BLOCK].long() * BLOCK + positions % BLOCK, tables,
        torch.full((rows,), context, dtype=torch.int32),
        torch.arange(rows + 1, dtype=torch.int32) * queries,
    )  # fmt: skip
    tokens = torch.randint(8192, (rows * queries,))
    last = torch.arange(1, rows + 1) * queries - 1
    return lambda: program.run(tokens, last, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=1.0, help="a cell and compiler")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--graphs", default="eager,inductor,onnxruntime")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = CpuDevice()
    state = LlamaForCausalLM(CONFIG).eval().state_dict()
    programs = {name: make_program(name, device, state) for name in options.graphs.split(",")}
    for rows, queries, context in ((1, 1, 512), (8, 1, 512), (32, 1, 160), (1, 128, 128)):
        calls = {name: step(program, rows, queries, context) for name, program in programs.items()}
        best = dict.fromkeys(calls, float("inf"))
        for call in calls.values():
            call()
        stop = time.perf_counter() + options.seconds * len(calls)
        while time.perf_counter() < stop:
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - started)
        own = best.get("onnxruntime", float("nan"))
        text = "  ".join(f"{n} {t * 1e3:6.2f} ms ({t / own:.2f})" for n, t in best.items())
        print(f"rows {rows:3} new {queries:4} context {context:4}  {text}", flush=True)


if __name__ == "__main__":
    main()
