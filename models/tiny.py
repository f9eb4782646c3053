"""Tiny models with random weights, one of every proven family: what tests and conformance run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["FAMILIES", "MOE_FAMILIES", "PROVEN", "SERVED", "save_tiny_model", "tiny_config",
           "tiny_model", "with_large_weights"]  # fmt: skip

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "gemma2": ("Gemma2Config", {"sliding_window": 6, "attn_logit_softcapping": 5.0,
                                "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 6, "query_pre_attn_scalar": 16,
                                    "num_hidden_layers": 4, "layer_types": [
                                        "sliding_attention", "sliding_attention",
                                        "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3Config", {}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 40, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", MOE),
}  # fmt: skip

PROVEN = tuple(FAMILIES)
MOE_FAMILIES = ("qwen3-moe", "mixtral")

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 64}  # fmt: skip

# Not promised, but served: sinks, values narrower than keys, frequencies that are rescaled, positions
# that are embedded, and a causal model that calls its base model's decoder.
FAMILIES |= {
    "gpt-oss": ("GptOssConfig", MOE | {"sliding_window": 6, "rope_parameters": YARN}),
    "deepseek-v3": ("DeepseekV3Config", {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 20, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1}),
    "gpt2": ("GPT2Config", {"hidden_size": 64, "num_key_value_heads": 4}),
    "opt": ("OPTConfig", {
        "hidden_size": 64, "num_key_value_heads": 4, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "qwen2-mixed-windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6,
                                            "max_window_layers": 1}),
    "rope-yarn": ("Qwen3Config", {"rope_parameters": YARN}),
    "rope-linear": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "rope-llama3": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 1e4}}),
}  # fmt: skip

SERVED = tuple(FAMILIES)


def tiny_config(family: str) -> Any:
    import transformers

    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**(COMMON | changes))
    config.dtype = "float32"
    return config


def tiny_model(family: str, seed: int = 0) -> Any:
    """A Hugging Face model in fp32 with weights large enough that attention matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
    return with_large_weights(model)


@torch.no_grad()
def with_large_weights(model: Any) -> Any:
    """The same model, drawn anew by torch's generator and ready to answer."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 2.0 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_tiny_model(family: str, folder: Path, *, shard: str = "5GB") -> Any:
    """Write a checkpoint to `folder` and return the model."""
    model = tiny_model(family)
    model.save_pretrained(folder, max_shard_size=shard)
    return model
