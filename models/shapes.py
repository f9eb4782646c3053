"""Shapes without weights, for benchmarks: `--shape 160m|1b|8b`, Llamas, and mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halyard.hal.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["SHAPES", "shape_config"]

SHAPES: dict[str, dict[str, Any]] = {
    "160m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "30b-a3b": {
        "kind": "Qwen3MoeConfig",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "20b-a4b": {
        "kind": "GptOssConfig",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}


def shape_config(shape: str) -> PretrainedConfig:
    """The Hugging Face config of a named shape, in bfloat16."""
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}: known are {', '.join(SHAPES)}")
    import transformers

    sizes = dict(SHAPES[shape])
    kind: str = sizes.pop("kind", "LlamaConfig")
    config: PretrainedConfig = getattr(transformers, kind)(
        **sizes,
        dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        architectures=[f"{kind.removesuffix('Config')}ForCausalLM"],
    )
    config.name_or_path = f"shape-{shape}"
    return config
