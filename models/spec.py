"""What the engine must know about a model before any weight is read. No torch here."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halyard.hal.errors import ModelError
from halyard.hal.types import DType, KVSpec, Requirements
from halyard.models.spec_cache import SpecCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halyard.models.source import ModelSource

__all__ = ["ModelSpec"]

_DTYPES = ("float32", "float16", "bfloat16")
_LAYER_TYPES = ("full_attention", "sliding_attention")  # what our attention computes
# Layer types of transformers' configs that keep a recurrent or compressed state, not a KV cache.
_STATEFUL = ("linear_attention", "mamba", "recurrent", "conv", "ssm")


class _Config:
    """A model's config, read when it is asked for if it isn't there yet."""

    def __init__(self, config: PretrainedConfig | None, source: ModelSource | None = None) -> None:
        self._config, self._source = config, source

    def get(self) -> PretrainedConfig:
        if self._config is None:
            if self._source is None:
                raise AssertionError("a spec without a config has the source of one")
            self._config = _unpacked(_read_config(self._source))
        return self._config


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shape, read from its Hugging Face config."""

    name: str  # what the API calls it
    architecture: str  # e.g. "LlamaForCausalLM"
    model_type: str  # e.g. "llama"
    vocab_size: int
    max_model_len: int  # positions the model was made for
    trained_len: int  # longer contexts have rotary frequencies of their own; 0: they have not
    hidden_size: int
    intermediate_size: int
    num_experts: int  # 1: the feed-forward layers are whole
    experts_per_token: int
    expert_size: int  # intermediate size of an expert, or of the whole
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int
    head_dim: int  # of the KV cache: the larger one where keys and values differ
    windows: tuple[int, ...]  # a layer's sliding window; 0: full attention
    softcap: bool  # attention scores are capped
    sinks: bool  # heads have sink logits
    tied: bool  # input embedding and lm_head are one matrix
    dtype: DType  # of the checkpoint
    packing: str  # of the checkpoint's large matrices: "mxfp4" or "fp8"; empty: none
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    config_digest: str
    held: _Config = field(repr=False, compare=False)

    @property
    def config(self) -> PretrainedConfig:
        """As transformers has it; imports transformers if the spec came from a cache."""
        return self.held.get()

    @classmethod
    def load(cls, source: ModelSource, cache: SpecCache | None = None) -> ModelSpec:
        """Read config.json (and generation_config.json) of a source, or what `cache` knows of them.

        Raises:
            ModelError: there is no config, or the model is none that can be served.
        """
        key = cache.key(Path(source.path)) if cache is not None else None
        kept = cache.find(key) if cache is not None and key is not None else None
        if kept is not None and (known := cls._from_facts(kept, source)) is not None:
            return known
        config = _read_config(source)
        generation: dict[str, Any] = {}
        path = Path(source.path) / "generation_config.json"
        if path.is_file():
            try:
                generation = json.loads(path.read_text())
            except ValueError as error:
                raise ModelError(f"{path} is not valid JSON: {error}") from error
            if not isinstance(generation, dict):
                raise ModelError(f"{path} is no JSON object: download it again")
        spec = cls.from_hf(config, name=source.name, generation_config=generation)
        if cache is not None and key is not None:
            cache.keep(key, {name: getattr(spec, name) for name in _KEPT})
        return spec

    @classmethod
    def _from_facts(cls, facts: dict[str, Any], source: ModelSource) -> ModelSpec | None:
        """None if they are not of this form."""
        if set(facts) != set(_KEPT):
            return None
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in facts.items()
        }
        return cls(name=source.name, held=_Config(None, source), **values)

    @classmethod
    def from_hf(
        cls,
        config: PretrainedConfig,
        *,
        name: str | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> ModelSpec:
        """Derive the spec.

        Raises:
            ModelError: the model is none that can be served; the text says why.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{config.model_type} is an encoder-decoder: only decoders can be served"
            )
        text = config.get_text_config(decoder=True)
        architecture = (getattr(config, "architectures", None) or [""])[0] or text.model_type
        if getattr(text, "is_heterogeneous", False):
            raise ModelError(
                f"{architecture} has layers of different shapes, which can't be served yet"
            )
        num_layers = _need(text, "num_hidden_layers")
        num_heads = _need(text, "num_attention_heads")
        num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
        if isinstance(num_kv_heads, list | tuple):
            if len(set(num_kv_heads)) > 1:
                raise ModelError(
                    f"{architecture} has layers with different numbers of kv heads, "
                    "which can't be served yet"
                )
            num_kv_heads = num_kv_heads[0]
        types = list(getattr(text, "layer_types", None) or ())
        stateful = sorted({t for t in types if any(word in t for word in _STATEFUL)})
        if stateful or text.model_type in ("mamba", "mamba2", "rwkv"):
            raise ModelError(
                f"{architecture} has layers that keep a recurrent state "
                f"({', '.join(stateful) or text.model_type}), which can't be served yet"
            )
        others = sorted(set(types) - set(_LAYER_TYPES))
        if others:
            raise ModelError(
                f"{architecture} has layers of type {', '.join(others)}, which can't be served yet"
            )
        if getattr(text, "num_kv_shared_layers", 0):
            raise ModelError(
                f"{architecture} has layers that share keys and values, which can't be served yet"
            )
        packing = _packing(config, architecture)
        eos = (generation_config or {}).get("eos_token_id", getattr(text, "eos_token_id", None))
        if eos is None:
            eos = getattr(config, "eos_token_id", None)
        dtype = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32")
        dtype = dtype.removeprefix("torch.")
        width = getattr(text, "intermediate_size", None) or 0
        max_model_len = getattr(text, "max_position_embeddings", None) or 2048
        return cls(
            name=name or getattr(config, "name_or_path", "") or text.model_type,
            architecture=architecture,
            model_type=text.model_type,
            vocab_size=_need(text, "vocab_size"),
            max_model_len=max_model_len,
            trained_len=_trained_len(text),
            hidden_size=_need(text, "hidden_size"),
            intermediate_size=width,
            num_experts=getattr(text, "num_local_experts", None)
            or getattr(text, "num_experts", None)
            or 1,
            experts_per_token=getattr(text, "num_experts_per_tok", None) or 1,
            expert_size=getattr(text, "moe_intermediate_size", None) or width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(text, num_heads),
            windows=_windows(text, types, num_layers, max_model_len),
            softcap=bool(getattr(text, "attn_logit_softcapping", None)),
            sinks=text.model_type == "gpt_oss",
            tied=bool(
                getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False))
            ),
            dtype=dtype if dtype in _DTYPES else "bfloat16",  # type: ignore[arg-type]
            eos_token_ids=_ids(eos),
            bos_token_id=getattr(text, "bos_token_id", None),
            packing=packing,
            config_digest=_digest(config),
            held=_Config(_unpacked(config)),
        )

    def kv_spec(self, dtype: DType, block_size: int = 16) -> KVSpec:
        return KVSpec(self.num_layers, self.num_kv_heads, self.head_dim, dtype, block_size)

    def requirements(self, dtype: DType, block_size: int = 16) -> Requirements:
        """What serving this model in `dtype` asks of a kernel set."""
        return Requirements(
            dtype=dtype,
            kv_dtype=dtype,
            block_size=block_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=any(self.windows),
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def is_long(self, context: int) -> bool:
        """Whether a context of so many tokens has the rotary frequencies of long ones (longrope)."""
        return 0 < self.trained_len < context

    def digest(self) -> str:
        """A digest of the config: models with equal digests trace to equal graphs."""
        return self.config_digest


# What a cache keeps: all that doesn't depend on where the files lie.
_KEPT = tuple(one.name for one in fields(ModelSpec) if one.name not in ("name", "held"))


def _read_config(source: ModelSource) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # of a field's type or size: each model's checks have their own
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ModelError(f"can't read the config of {source.name}: {reason}") from error
    return config


def _digest(config: PretrainedConfig) -> str:
    facts = config.to_dict()
    for key in ("_name_or_path", "name_or_path", "transformers_version", "dtype",
                "quantization_config"):  # fmt: skip
        facts.pop(key, None)
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _packing(config: PretrainedConfig, architecture: str) -> str:
    """How the checkpoint's weights are packed, of the ways that can be read."""
    facts = getattr(config, "quantization_config", None)
    if not facts:
        return ""
    facts = facts if isinstance(facts, dict) else facts.to_dict()
    method = str(facts.get("quant_method"))
    if method == "mxfp4" or (
        method == "fp8" and list(facts.get("weight_block_size") or ()) == [128, 128]
    ):
        return method
    raise ModelError(
        f"this checkpoint of {architecture} is quantised ({method}), which can't be "
        "served yet: use the unquantised one"
    )


def _unpacked(config: PretrainedConfig) -> PretrainedConfig:
    """As it describes the model once its weights are unpacked."""
    if not getattr(config, "quantization_config", None):
        return config
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


def _need(config: PretrainedConfig, field: str) -> int:
    value = getattr(config, field, None)
    if not isinstance(value, int):
        raise ModelError(f"the config of {config.model_type} has no {field}: not a decoder?")
    if value < 1:
        raise ModelError(
            f"the config of {config.model_type} has {field} {value}: it must be positive"
        )
    return value


def _ids(value: Any) -> tuple[int, ...]:
    """Configs give one id, several or none."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(type(one) is int for one in ids):
        raise ModelError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return ids


def _head_dim(config: PretrainedConfig, num_heads: int) -> int:
    """The cache's head dim. Where keys and values differ (MLA), values are padded."""
    qk = (getattr(config, "qk_nope_head_dim", 0) or 0) + (
        getattr(config, "qk_rope_head_dim", 0) or 0
    )
    if qk:
        return max(qk, getattr(config, "v_head_dim", 0) or 0)
    return int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)


def _trained_len(config: PretrainedConfig) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return 0
    known = rope.get("original_max_position_embeddings")
    return int(known or config.max_position_embeddings)


def _windows(
    config: PretrainedConfig, types: list[str], num_layers: int, max_model_len: int
) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False or window >= max_model_len:
        window = 0  # not wanted, or never left
    if types:
        return tuple(window if "sliding" in kind else 0 for kind in types)
    return (window,) * num_layers
