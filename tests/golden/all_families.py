"""Every decoder that transformers has, tiny and with random weights: served as Hugging Face answers, or refused.

    python tests/golden/all_families.py [KIND ...] [--backend cpu-eager] [--jobs N]

Prints a line each, and a table at the end for docs/models.md. Fails if a model answers otherwise than
Hugging Face's own code in fp32, or ends in anything but one clear line. Each runs in a process of its own:
what writes where it must not takes only that down. Takes some minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# Set where a kind of config has the field.
FIELDS: dict[str, Any] = {
    "head_dim": 16, "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1,
    "topk_group": 1, "sliding_window": 7, "ffn_dim": 80, "word_embed_proj_dim": 64,
    "query_pre_attn_scalar": 16, "first_k_dense_replace": 1, "ffn_hidden_size": 80,
    "shared_expert_intermediate_size": 48, "n_shared_experts": 1, "num_shared_experts": 1,
}  # fmt: skip
LATENT = {"head_dim": 16, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
          "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}  # fmt: skip
# What a kind's own checks want otherwise.
SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "modernbert-decoder": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "persimmon": {"num_key_value_heads": 4}, "stablelm": {"num_key_value_heads": 2},
}  # fmt: skip
PROMPTS = (3, 17, 40)  # tokens of each
ANSWER = 10


def tiny_config(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    usual = made()
    sizes = SIZES | {name: value for name, value in FIELDS.items() if hasattr(usual, name)}
    if hasattr(usual, "kv_lora_rank"):
        sizes |= LATENT
    if kind == "gpt_bigcode":  # follows from its own multi_query
        del sizes["num_key_value_heads"]
    config = made(**sizes | SPECIAL.get(kind, {}))
    config.dtype = "float32"
    return config


def look(kind: str, backend: str, told: Any) -> None:
    """Send (state, detail) of one kind."""
    warnings.filterwarnings("ignore")
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    import torch
    from transformers import AutoModelForCausalLM

    from halyard import LLM, SamplingParams
    from halyard.hal.errors import HalyardError
    from halyard.models.tiny import with_large_weights

    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = tiny_config(kind)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > 5e7:
                return told.send(("not tried", "its config has no tiny form"))
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            with_large_weights(model).save_pretrained(folder)
            with torch.no_grad():
                want = [list(prompt) for prompt in prompts]
                for ids in want:
                    for _ in range(ANSWER):
                        logits = model(torch.tensor([ids]), use_cache=False).logits
                        ids.append(int(logits[0, -1].argmax()))
        except Exception as error:  # noqa: BLE001 - the library's own, whatever it is
            return told.send(("not tried", f"{type(error).__name__}: {error}".split("\n")[0]))
        params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        try:
            with LLM(folder, backend=backend, dtype="float32", kv_blocks=256) as llm:
                found = llm.generate(prompts, params)
        except HalyardError as error:
            return told.send(("refused" if "\n" not in str(error) else "WRONG", str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a bug
            return told.send(("WRONG", f"{type(error).__name__}: {error}"))
    got = [prompt + list(o.outputs[0].token_ids) for prompt, o in zip(prompts, found, strict=True)]
    return told.send(("served", "") if got == want else ("WRONG", "other tokens"))


def apart(kind: str, backend: str) -> tuple[str, str]:
    """`look` in a process of its own."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=look, args=(kind, backend, theirs))
    process.start()
    theirs.close()
    try:
        state, detail = mine.recv() if mine.poll(120) else ("not tried", "took two minutes")
    except EOFError:
        process.join()
        state, detail = "WRONG", f"its process ended with {process.exitcode}"
    process.kill()
    print(f"{kind:<24} {state:<10} {detail[:160]}", flush=True)
    return state, detail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("kinds", nargs="*", help="model_type of each (default: all)")
    parser.add_argument("--backend", default="cpu-eager")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    import transformers

    import halyard.models.tiny  # noqa: F401 - once, for all that are forked

    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kinds = args.kinds or sorted(names)
    with ThreadPoolExecutor(args.jobs) as pool:
        states = dict(
            zip(kinds, pool.map(partial(apart, backend=args.backend), kinds), strict=True)
        )
    print(f"\ntransformers {transformers.__version__}")
    for state in ("served", "refused", "not tried", "WRONG"):
        those = [kind for kind, (found, _) in states.items() if found == state]
        print(f"{state} ({len(those)}): {', '.join(those)}")
    return int(any(state == "WRONG" for state, _ in states.values()))


if __name__ == "__main__":
    sys.exit(main())
