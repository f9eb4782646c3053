"""ONNX Runtime's PagedAttention on CUDA against the contract's attention of our Triton kernels.

Usage: python benchmarks/onnx_paged_gpu.py [--dtype float16] [--heads 32] [--kv-heads 8] [--dim 128]
                                           [--block 16] [--json FILE]

Both write a step's keys and values to blocks of the same layout and attend; results are held against
each other first. Calls of many cold copies are issued one after another on one stream, and the
device's time between two events is divided by them: that holds what either costs on the host where
it is more than the kernel. `captured`: the same calls recorded as one graph, where that works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu_attention
import onnx
import onnxruntime
import torch
from gpu_attention import CELLS, Bench, Cell
from onnx import TensorProto, helper
from torch import Tensor

from halyard.hal.types import StepBatch

KINDS = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
CELL_NAMES = ("decode 1 x 1024", "decode 1 x 8192", "decode 64 x 1024", "decode 64 x 8192",
              "decode 256 x 1024", "decode 256 x 8192", "prefill 1 x 8192", "prefill 2 x 4000",
              "prefill 8 x 1024", "mixed 63 x 4096 + 512")  # fmt: skip
Call = Callable[[], object]


def model(heads: int, kv_heads: int, dim: int, kind: int) -> bytes:
    """One PagedAttention node."""
    cache = ["blocks", "size", kv_heads, dim]
    floats = {"query": ["t", heads * dim], "key": ["t", kv_heads * dim], "value": ["t", kv_heads * dim],
              "key_cache": cache, "value_cache": cache}  # fmt: skip
    ints = {"query_start": ["rows1"], "past_lens": ["rows"], "block_tables": ["rows", "width"],
            "slot_mapping": ["t"], "bounds": [2]}  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in floats.items()]
    inputs += [helper.make_tensor_value_info(n, TensorProto.INT32, s) for n, s in ints.items()]
    outputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, shape in (("out", ["t", heads * dim]), ("keys", cache), ("values", cache))
    ]
    node = helper.make_node(
        "PagedAttention",
        ["query", "key", "value", "key_cache", "value_cache", "query_start", "past_lens",
         "block_tables", "", "", "slot_mapping", "", "", "", "", "", "bounds"],
        ["out", "keys", "values"], domain="com.microsoft",
        num_heads=heads, kv_num_heads=kv_heads, scale=float(dim**-0.5),
    )  # fmt: skip
    graph = helper.make_graph([node], "paged", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets)
    made.ir_version = 10
    return bytes(made.SerializeToString())


class Rival:
    """The node on torch's stream and memory."""

    def __init__(self, bench: Bench, stream: torch.cuda.Stream, dtype: torch.dtype) -> None:
        settings = {"device_id": "0", "user_compute_stream": str(stream.cuda_stream)}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        data = model(bench.heads, bench.kv_heads, bench.dim, KINDS[dtype])
        self.session = onnxruntime.InferenceSession(
            data, options, providers=[("CUDAExecutionProvider", settings)]
        )
        self.run_options = onnxruntime.RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.dtype = dtype
        size = bench.pool.num_blocks
        shape = (size, gpu_attention.BLOCK, bench.kv_heads, bench.dim)
        self.caches = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2)]

    def call(self, batch: StepBatch, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor) -> Call:
        past = batch.seq_lens - batch.query_start.diff()
        tensors: dict[str, Tensor] = {
            "query_start": batch.query_start, "past_lens": past.int(),
            "block_tables": batch.block_tables, "slot_mapping": batch.slot_mapping.int(),
            "key_cache": self.caches[0], "value_cache": self.caches[1],
            "bounds": torch.tensor([batch.max_query_len, batch.max_seq_len], dtype=torch.int32),
        }  # fmt: skip
        tensors |= {
            name: x.flatten(1) for name, x in zip(("query", "key", "value"), qkv, strict=True)
        }
        binding = self.session.io_binding()
        for name, x in tensors.items():
            kind = KINDS.get(x.dtype, TensorProto.INT32)
            binding.bind_input(name, x.device.type, 0, kind, list(x.shape), x.data_ptr())
        kind = KINDS[self.dtype]
        for name, x in (("out", out), ("keys", self.caches[0]), ("values", self.caches[1])):
            binding.bind_output(name, "cuda", 0, kind, list(x.shape), x.data_ptr())

        def run(held: Any = (tensors, binding)) -> None:
            self.session.run_with_iobinding(binding, self.run_options)

        return run


def time_calls(calls: list[Call], stream: torch.cuda.Stream, budget: float) -> float:
    """Device seconds a call, issued one after another; the best of the repeats."""
    best, stop, repeats = float("inf"), time.perf_counter() + budget, 0
    while repeats < 3 or time.perf_counter() < stop:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        for call in calls:
            call()
        end.record(stream)
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / len(calls))
        repeats += 1
    return best


def time_captured(calls: list[Call], stream: torch.cuda.Stream, budget: float) -> float | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            for call in calls:
                call()
    except Exception as problem:  # noqa: BLE001 - told as "not captured"
        print(f"    not captured: {str(problem).splitlines()[0][:120]}", file=sys.stderr)
        return None
    return time_calls([graph.replay], stream, budget) / len(calls)


def run(bench: Bench, rival: Rival, cell: Cell, stream: torch.cuda.Stream) -> dict[str, Any]:
    batches, qkv = bench.batches(cell), bench.inputs(cell)
    # The same contents in both pools for the comparison: what the first batch reads.
    used = batches[0].block_tables[batches[0].block_tables >= 0].long().unique()
    pool = bench.pool.data[0]  # [blocks, 2, heads, size, dim]
    for index, cache in enumerate(rival.caches):
        cache[used] = pool[used, index].transpose(1, 2)  # from [blocks, heads, size, dim]
    outs = [torch.empty_like(qkv[0]).flatten(1) for _ in range(2)]
    theirs = [rival.call(batch, qkv, outs[0]) for batch in batches]

    ours: list[Call] = [
        lambda batch=batch: bench.kernels.attend(*qkv, bench.pool, bench.layer, batch)  # type: ignore[misc]
        for batch in batches
    ]
    expected = bench.kernels.attend(*qkv, bench.pool, bench.layer, batches[0]).flatten(1)
    theirs[0]()
    torch.cuda.synchronize()
    difference = float(
        (outs[0].float() - expected.float()).abs().max() / expected.float().abs().max()
    )
    result: dict[str, Any] = {"cell": cell.name, "difference": difference}
    for name, calls in (("ours", ours), ("onnxruntime", theirs)):
        result[name] = time_calls(calls, stream, 0.3)
        result[f"{name} captured"] = time_captured(calls, stream, 0.3)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--dtype", default="float16", choices=["bfloat16", "float16"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=16, help="16 or a multiple of 256")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds; later cells are left")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    gpu_attention.BLOCK = options.block
    started = time.perf_counter()
    stream = torch.cuda.Stream()
    found = []
    with torch.inference_mode(), torch.cuda.stream(stream):
        bench = Bench(options)
        rival = Rival(bench, stream, bench.dtype)
        print(f"{bench.device.info.name}, onnxruntime {onnxruntime.__version__}, torch "
              f"{torch.__version__}, onnx {onnx.__version__}, {options.dtype}, heads "
              f"{options.heads}/{options.kv_heads} dim {options.dim}, block {options.block}")  # fmt: skip
        for cell in (cell for cell in CELLS if cell.name in CELL_NAMES):
            if time.perf_counter() - started > options.limit:
                print(f"{cell.name}: left out, {options.limit:g} s are over")
                continue
            result = run(bench, rival, cell, stream)
            found.append(result)
            parts = [f"{key} {value * 1e6:.1f} us" if isinstance(value, float) else f"{key} -"
                     for key, value in result.items() if key not in ("cell", "difference")]  # fmt: skip
            print(
                f"{cell.name:24} {'  '.join(parts)}  difference {result['difference']:.1e}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "dtype": options.dtype,
                    "dim": options.dim,
                    "block": options.block,
                    "cells": found,
                },
                file,
                indent=1,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
