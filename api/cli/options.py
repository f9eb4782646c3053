"""Options that every command with an engine shares: the fields of EngineConfig."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from halyard.runtime.config import EngineConfig

__all__ = ["add_engine_arguments", "engine_config"]


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; MODEL itself is the command's."""
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add(
        "--backend",
        metavar="NAME",
        help="a row of hw_matrix.yaml (default: the best that runs here)",
    )
    add("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"],
        help="auto: the checkpoint's, where the device computes in it")  # fmt: skip
    add("--quantization", default="none", choices=["none", "int8", "int4"],
        help="bits of the linears' weights (backend cpu)")  # fmt: skip
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer together")
    add("--block-size", type=int, default=16, metavar="N", help="tokens a KV block (default 16)")
    add("--memory-utilization", type=float, default=0.9, metavar="SHARE",
        help="share of the device's memory to plan with (default 0.9)")  # fmt: skip
    add("--kv-blocks", type=int, metavar="N", help="KV blocks on the device (default: what fits)")
    add("--host-kv-blocks", type=int, metavar="N", help="KV blocks in the host tier")
    add("--load-format", default="auto", choices=["auto", "dummy"],
        help="dummy: random weights from the config alone")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of random weights and unseeded requests")
    add(
        "--max-num-sequences",
        type=int,
        metavar="N",
        help="answers that run at once; default: 256 on a CPU, 1024 on a GPU",
    )
    add("--max-batched-tokens", type=int, metavar="N", help="tokens a step")
    add("--no-prefix-cache", action="store_true", help="do not share blocks of equal prefixes")
    add("--max-queue-len", type=int, default=1024, metavar="N",
        help="waiting requests before 429 is answered (default 1024)")  # fmt: skip
    add("--preemption", default="auto", choices=["auto", "swap", "recompute"],
        help="how a sequence gives way when blocks run out")  # fmt: skip
    add("--no-overlap", action="store_true",
        help="issue a step only when the one before is back, on devices too that work on alone")  # fmt: skip
    add("--no-shared-attention", action="store_true",
        help="each sequence reads its KV blocks itself, those too that several share")  # fmt: skip
    add("--no-device-sampling", action="store_true",
        help="draw tokens with torch, not with the device's own kernels")  # fmt: skip
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--mirror", type=Path, metavar="DIR", default=os.environ.get("HALYARD_MIRROR"),
        help="find the model there, as `halyard models mirror` put it")  # fmt: skip
    add("--require-verified", action="store_true",
        help="refuse a model whose files no manifest vouches for")  # fmt: skip
    add(
        "--manifest-digest", metavar="SHA256", help="of the manifest itself, as `models list` shows"
    )
    add("--matrix", type=Path, metavar="FILE", help="another hw_matrix.yaml")
    add(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="compiled artefacts (default ~/.cache/halyard)",
    )
    add("--dump-dir", type=Path, metavar="DIR", help="write the graph after each compiler pass")


def engine_config(args: argparse.Namespace, **changes: Any) -> EngineConfig:
    """The config that the options ask for.

    Raises:
        ConfigError: a value is out of range.
    """
    options: dict[str, Any] = {
        "model": args.model,
        "backend": args.backend,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "max_model_len": args.max_model_len,
        "block_size": args.block_size,
        "memory_utilization": args.memory_utilization,
        "kv_blocks": args.kv_blocks,
        "host_kv_blocks": args.host_kv_blocks,
        "load_format": args.load_format,
        "seed": args.seed,
        "max_num_sequences": args.max_num_sequences,
        "max_batched_tokens": args.max_batched_tokens,
        "prefix_cache": not args.no_prefix_cache,
        "max_queue_len": args.max_queue_len,
        "preemption": args.preemption,
        "overlap": not args.no_overlap,
        "shared_attention": not args.no_shared_attention,
        "device_sampling": not args.no_device_sampling,
        "revision": args.revision,
        "mirror": args.mirror,
        "require_verified": args.require_verified or args.manifest_digest is not None,
        "manifest_digest": args.manifest_digest,
        "matrix": args.matrix,
        "cache_dir": args.cache_dir,
        "dump_dir": args.dump_dir,
        "progress": sys.stderr.isatty(),
    }
    return EngineConfig(**(options | changes))
