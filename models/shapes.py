"""Llama shapes without weights, for benchmarks: `--shape 160m|1b|8b`."""

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
}


def shape_config(shape: str) -> PretrainedConfig:
    """The Hugging Face config of a named shape, in bfloat16."""
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}: known are {', '.join(SHAPES)}")
    from transformers import LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape],
        dtype="bfloat16",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    config.name_or_path = f"shape-{shape}"
    return config
