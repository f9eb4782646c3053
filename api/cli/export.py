"""`halyard export MODEL --onnx DIR`: the model's graphs and weights for use elsewhere."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from halyard.hal.types import DType

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="embedded", help="folder, hub id or 'embedded'")
    parser.add_argument(
        "--onnx", type=Path, required=True, metavar="DIR", help="write ONNX files to this folder"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float16"],
        help="of weights and arithmetic (default float32; float16 is for GPUs)",
    )
    parser.add_argument(
        "--paged-attention",
        action="store_true",
        help="also with ONNX Runtime's own paged attention, for its CUDA provider (float16)",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")


def run(args: argparse.Namespace) -> int:
    from halyard.compiler.onnx_export import (
        ExportFacts,
        check_directory,
        check_onnx,
        export_onnx,
    )

    # What a user can mend is told before anything is downloaded or traced.
    check_onnx()
    check_directory(args.onnx)
    from halyard.compiler.program import HeadShape
    from halyard.models.adapter import build_meta_module
    from halyard.models.headers import check_checkpoint
    from halyard.models.weights import load_weights
    from halyard.runtime.planner import resolve_model

    started = time.perf_counter()
    dtype: DType = args.dtype
    source, spec = resolve_model(args.model, args.revision)
    if source is not None:
        check_checkpoint(source)
    model = build_meta_module(spec, dtype)
    facts = ExportFacts(
        name=spec.name,
        architecture=spec.architecture,
        dtype=dtype,
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        windows=spec.windows,
        heads=HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim),
        eos_token_ids=spec.eos_token_ids,
        paged_attention=args.paged_attention,
    )
    export_onnx(
        model,
        model.buffers_by_name,
        lambda wanted: load_weights(source, spec, wanted, dtype, progress=sys.stderr.isatty()),
        args.onnx,
        facts,
    )
    size = sum(file.stat().st_size for file in args.onnx.rglob("*") if file.is_file())
    seconds = time.perf_counter() - started
    print(f"wrote {args.onnx}: {size / 1e6:,.1f} MB in {seconds:.1f} s; start with its README.md")
    return 0
