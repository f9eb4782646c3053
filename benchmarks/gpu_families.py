"""Families of models that the five workloads don't show, in sizes that are in use, with random weights.

PYTHONPATH=pkg python benchmarks/gpu_families.py --out $OUT/families.jsonl --budget 520 [--only NAME ...]

Each family has one engine. `single` is one sequence, `decode` 256 at once, `prefill` 32 prompts of 4,000
tokens, `long` four prompts of 30,000 tokens and 128 answered. A line says the rate, and which share of
the device's limits that is: bytes and arithmetic of each step, counted, over the rates measured there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # as Qwen2.5-0.5B and 7B, Qwen3-8B
    "qwen2-0.5b": ("Qwen2Config", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True}),
    "qwen2-7b": ("Qwen2Config", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}),
    "qwen3-8b": ("Qwen3Config", {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936}),
    # as Gemma 2 9B, Gemma 3 4B
    "gemma2-9b": ("Gemma2Config", {
        "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "vocab_size": 256000}),
    "gemma3-4b": ("Gemma3TextConfig", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 1024, "vocab_size": 262208}),
    # as Phi-3-mini, OLMo 2 7B (every head its own keys), Mistral Nemo, GPT-2 XL, OPT-6.7B
    "phi3-mini": ("Phi3Config", {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "pad_token_id": None}),
    "olmo2-7b": ("Olmo2Config", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100352,
        "pad_token_id": None}),
    "nemo-12b": ("MistralConfig", {
        "hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "sliding_window": None, "vocab_size": 131072}),
    # as DeepSeek-V2-Lite, by DeepSeek V3's code
    "deepseek-16b": ("DeepseekV3Config", {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400}),
}  # fmt: skip

WORKLOADS: dict[str, tuple[int, int, int]] = {  # requests, tokens of each prompt and answer
    "single": (1, 128, 128),
    "decode": (256, 128, 128),
    "prefill": (32, 4000, 4),
    "long": (4, 30000, 128),
}


def config_of(name: str) -> Any:
    import transformers

    kind, sizes = FAMILIES[name]
    config = getattr(transformers, kind)(
        **sizes, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None
    )
    config.dtype = "bfloat16"
    config.architectures = [f"{kind.removesuffix('Config').removesuffix('Text')}ForCausalLM"]
    config.name_or_path = name
    return config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", nargs="+", default=list(FAMILIES))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything")
    parser.add_argument(
        "--kernels", type=int, default=0, help="so many that took longest, of a run"
    )
    parser.add_argument("--out", type=Path, help="JSONL to append to")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget
    for name in args.only:
        if time.monotonic() + 45 > deadline:
            print(f"no time left for {name}", file=sys.stderr)
            continue
        measure(args, name, deadline)
        gc.collect()
    return 0


def measure(args: argparse.Namespace, name: str, deadline: float) -> None:
    import numpy as np

    from halyard.runtime.bench import measure_throughput, report
    from halyard.runtime.limits import device_limits
    from halyard.runtime.llm import LLM
    from halyard.runtime.profile import profiled
    from halyard.runtime.workloads import Workload, WorkloadRequest

    with LLM(model=config_of(name), load_format="dummy") as llm:
        limits = device_limits(llm.engine.executor.device, llm.plan.dtype)
        for workload in args.workloads:
            if time.monotonic() + 10 > deadline:
                print(f"no time left for {name}/{workload}", file=sys.stderr)
                continue
            count, prompt, answer = WORKLOADS[workload]
            tokens = np.random.RandomState(0).randint(1, 30000, (count, prompt))
            requests = tuple(WorkloadRequest(tuple(map(int, row)), answer) for row in tokens)
            measured = measure_throughput(llm, Workload(workload, requests), 1, 1, limits)
            found = {"family": name} | report(llm, measured)
            rate = found["output_tokens_per_second"]
            if workload == "prefill":
                rate = found["total_tokens_per_second"]
            print(
                f"{name:<13} {workload:<8} {rate:>10,.0f} tok/s {found['seconds']:7.3f} s "
                f"{found['fraction_of_limit']:5.0%} of the limit, {found['steps']} steps, "
                f"start {found['startup_seconds']:.0f} s",
                flush=True,
            )
            if args.kernels:
                with profiled(llm.engine) as profile:
                    measure_throughput(llm, Workload(workload, requests))
                print(profile.table())
                for kernel, seconds, calls in profile.kernels[: args.kernels]:
                    each = 1e3 * seconds / profile.steps
                    print(f"  {each:8.3f} ms {calls / profile.steps:7.1f}x {kernel[:110]}")
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
