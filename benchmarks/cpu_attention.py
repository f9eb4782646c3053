"""Native paged attention against its rivals, in one interleaved run.

Usage: python benchmarks/cpu_attention.py [--threads N] [--seconds S]

Rivals: `sdpa` gathers the blocks of each sequence and calls scaled_dot_product_attention, the query
heads of a group folded into query rows when decoding; `dense` is the same without the gather (keys
and values already contiguous: what no paged cache can have); `tvm` is Halyard's kernel set of that
name, on one thread unless TVM_NUM_THREADS says otherwise. Figures are microseconds a call, and
the ratio to native (above 1: native is faster). GB/s counts keys and values read once; `of read` is
that over what a plain sum of a large tensor reaches in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import best_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native.kernels import NativeKernels
from halyard.hal.kernels.tvm.kernels import TvmKernels
from halyard.hal.types import AttentionLayer, KVSpec, StepBatch

BLOCK = 16


def make_calls(
    kernels: NativeKernels,
    tvm: TvmKernels | None,
    device: CpuDevice,
    rows: int,
    context: int,
    queries: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
) -> dict[str, Callable[[], object]]:
    """The competitors on equal random contents, blocks in random places."""
    per_row = -(-context // BLOCK)
    name = "float32" if dtype == torch.float32 else "bfloat16"
    spec = KVSpec(1, kv_heads, dim, name, BLOCK)
    pool = device.allocate_kv(kernels.layout(spec), rows * per_row, host=False)
    pool.data.normal_()
    tables = torch.randperm(rows * per_row).to(torch.int32).view(rows, per_row)
    # The rival's cache: [blocks, block, kv_heads, dim], which it gathers into rows.
    paged_k, paged_v = (
        torch.randn(rows * per_row, BLOCK, kv_heads, dim).to(dtype) for _ in range(2)
    )
    q = torch.randn(rows * queries, heads, dim).to(dtype)
    k, v = (torch.randn(rows * queries, kv_heads, dim).to(dtype) for _ in range(2))
    positions = torch.arange(context - queries, context).repeat(rows)
    row_of = torch.arange(rows).repeat_interleave(queries)
    slots = tables[row_of, positions // BLOCK].long() * BLOCK + positions % BLOCK
    batch = StepBatch(
        rows * queries, rows, queries, context, positions, slots, tables,
        torch.full((rows,), context, dtype=torch.int32),
        torch.arange(rows + 1, dtype=torch.int32) * queries,
    )  # fmt: skip
    layer = AttentionLayer(0, heads, kv_heads, dim, dim**-0.5)
    group = heads // kv_heads

    def gather(paged: Tensor) -> Tensor:
        chosen = paged[tables.view(-1)].view(rows, per_row * BLOCK, kv_heads, dim)
        return chosen[:, :context].transpose(1, 2)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        if queries == 1:
            folded = q.view(rows, kv_heads, group, dim)
            return scaled_dot_product_attention(folded, keys, values)
        wide = q.view(rows, queries, heads, dim).transpose(1, 2)
        return scaled_dot_product_attention(wide, keys, values, is_causal=True, enable_gqa=True)

    dense_k, dense_v = gather(paged_k).contiguous(), gather(paged_v).contiguous()
    calls: dict[str, Callable[[], object]] = {
        "native": lambda: kernels.attend(q, k, v, pool, layer, batch),
        "sdpa": lambda: attend(gather(paged_k), gather(paged_v)),
        "dense": lambda: attend(dense_k, dense_v),
    }
    if tvm is not None:
        other = device.allocate_kv(tvm.layout(spec), rows * per_row, host=False)
        blocks = range(rows * per_row)
        tvm.write_blocks(other, blocks, kernels.read_blocks(pool, blocks))
        torch.testing.assert_close(
            tvm.attend(q, k, v, other, layer, batch),
            kernels.attend(q, k, v, pool, layer, batch),
            atol=1e-5 if dtype == torch.float32 else 2e-2,
            rtol=1e-5 if dtype == torch.float32 else 2e-2,
        )
        calls["tvm"] = lambda: tvm.attend(q, k, v, other, layer, batch)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=0.3, help="a cell and competitor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", help="decode only, with so many rows")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096], help="with --rows")
    options = parser.parse_args()
    device = CpuDevice()
    kernels = NativeKernels(device)
    found = TvmKernels.probe(device.info)
    tvm = TvmKernels(device) if found.available else None
    if tvm is None:
        print(f"without tvm: {'; '.join(found.reasons)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stream = torch.ones(1 << 26)
    rate = stream.nbytes / best_of({"sum": stream.sum}, 1.0)["sum"]
    print(f"{kernels.isa}, {options.threads} threads, stream read {rate / 1e9:.1f} GB/s")
    cells = [
        (rows, context, 1, kv_heads, dim)
        for rows, context in ((8, 512), (8, 4096), (64, 512), (1, 16384))
        for kv_heads in (2, 8)
        for dim in (64, 128)
    ] + [(rows, n, n, 2, dim) for rows, n in ((1, 1024), (4, 512)) for dim in (64, 128)]
    if options.rows:
        cells = [
            (rows, context, 1, 2, dim)
            for rows in options.rows for context in options.contexts for dim in (64, 128)
        ]  # fmt: skip
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for rows, context, queries, kv_heads, dim in cells:
                calls = make_calls(
                    kernels, tvm, device, rows, context, queries, 8, kv_heads, dim, dtype
                )
                best = best_of(calls, options.seconds)
                text = "  ".join(
                    f"{name} {t * 1e6:9.1f} us ({t / best['native']:5.2f}x)"
                    for name, t in best.items()
                )
                if queries == 1:
                    moved = 2 * rows * context * kv_heads * dim * dtype.itemsize / best["native"]
                    note = f"{moved / 1e9:5.1f} GB/s, {moved / rate:4.0%} of read"
                else:
                    work = 2 * rows * queries * queries * 8 * dim / best["native"]
                    note = f"{work / 1e9:5.1f} GFLOP/s"
                print(
                    f"{str(dtype)[6:]:8} {'decode' if queries == 1 else 'prefill'} {rows:2} x "
                    f"{context:5} heads 8/{kv_heads} dim {dim:3}  {text}  {note}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
