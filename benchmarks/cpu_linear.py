"""Packed linear against torch's own, in one interleaved run. Usage: python benchmarks/cpu_linear.py

Columns: microseconds a call and the ratio to ours (above 1: ours is faster). `onednn` multiplies
with weights that oneDNN packed beforehand, where this torch has that. Each call takes the next of
several weights, more than fit any cache, as the layers of a model do; --hot uses one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from timing import best_of
from torch import Tensor
from torch.nn import functional

from halyard.hal.kernels.native.linear import pack_linear, packed_linear

SHAPES = [(2304, 768), (4096, 768), (768, 2048), (8192, 2048)]
ROWS = [1, 4, 16, 64, 512]
COLD_BYTES = 160 << 20  # of weights, beyond the last cache


def onednn(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A call with prepacked weights, or None where this build of torch has no such operator."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    except (AttributeError, RuntimeError):
        return None
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.15, help="a cell and competitor")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--hot", action="store_true", help="the same weight in every call")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16):
                for outputs, inputs in SHAPES:
                    size = outputs * inputs * dtype.itemsize
                    copies = 1 if options.hot else max(1, COLD_BYTES // size)
                    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
                    packed = [pack_linear(weight) for weight in weights]
                    library = [onednn(weight) for weight in weights]
                    for rows in ROWS:
                        x = torch.randn(rows, inputs).to(dtype)
                        calls: dict[str, Callable[[], object]] = {
                            "ours": lambda: [packed_linear(x, w, None, outputs) for w in packed],  # noqa: B023
                            "torch": lambda: [functional.linear(x, w) for w in weights],  # noqa: B023
                        }
                        if library[0] is not None:
                            calls["onednn"] = lambda: [f(x) for f in library if f]  # noqa: B023
                        best = {
                            name: t / copies for name, t in best_of(calls, options.seconds).items()
                        }
                        text = "  ".join(
                            f"{name} {t * 1e6:9.1f} us ({t / best['ours']:5.2f}x)"
                            for name, t in best.items()
                        )
                        rate = size / best["ours"] / 1e9
                        work = 2 * rows * outputs * inputs / best["ours"] / 1e9
                        print(
                            f"{threads} thr {str(dtype)[6:]:8} {outputs:5}x{inputs:<5} "
                            f"rows {rows:4}  {text}  {rate:6.1f} GB/s {work:7.1f} GFLOP/s",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
