"""Any Hugging Face decoder as a module that can be traced without its weights.

The module is built on the meta device, and transformers' AttentionInterface sends every attention
to `halyard::paged_attention`. No mask function is registered under our name, so the library builds
no mask: causality, windows and caps are the kernels' business.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import ModelError
from halyard.hal.ops import paged_attention
from halyard.hal.types import DType
from halyard.models import experts
from halyard.models.spec import ModelSpec

__all__ = ["ATTENTION_NAME", "TraceableModel", "build_meta_module"]

ATTENTION_NAME = "halyard_paged"


class TraceableModel(nn.Module):
    """A flat batch of tokens in, logits of chosen tokens and all final hidden states out.

    Parameters are on the meta device.

    `buffers_by_name` holds the real values of non-persistent buffers (rotary frequencies and the
    like), which no checkpoint contains.
    """

    def __init__(self, model: nn.Module, buffers_by_name: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.buffers_by_name = buffers_by_name

    def forward(
        self, input_ids: Tensor, positions: Tensor, logit_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """input_ids, positions [tokens] int64; logit_indices [rows] int64.

        Returns logits [rows, vocab] and hidden states [tokens, hidden], after the final norm.
        """
        hidden: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden.append(output[0])

        # Some (OPT) call their base model's decoder and never the base model.
        base = self.model.base_model
        decoder = getattr(base, "decoder", None)
        handles = [
            one.register_forward_hook(keep) for one in (base, decoder) if isinstance(one, nn.Module)
        ]
        try:
            output = self.model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                attention_mask=None,
                use_cache=False,
                logits_to_keep=logit_indices,
            )
        finally:
            for handle in handles:
                handle.remove()
        return output.logits[0], hidden[-1][0]


def build_meta_module(spec: ModelSpec, dtype: DType, context: int | None = None) -> TraceableModel:
    """Build the model without weights.

    Args:
        context: most tokens of a sequence, which decides the rotary frequencies of all (longrope). None:
            as many as the model was made for.

    Raises:
        ModelError: transformers has no such decoder, or it can't be routed through our attention.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
    config = copy.deepcopy(spec.config)
    _check_rope(config)
    if spec.trained_len:
        _settle_rope(config, spec.is_long(context or spec.max_model_len))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch_dtype(dtype),
                attn_implementation=ATTENTION_NAME,
                trust_remote_code=False,
            )
        experts.install(model)
        model.eval().requires_grad_(False)
        buffers = _real_buffers(model)
        if spec.trained_len:
            for module in model.modules():
                if getattr(module, "rope_type", None) == "longrope":
                    module.rope_type = "default"  # its frequencies are settled
        return TraceableModel(model, buffers)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"{spec.architecture} can't be served: {reason}") from error


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    if not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__} looks at later tokens: only decoders are served")
    if attention_mask is not None:
        raise ModelError(f"{type(module).__name__} makes its own attention mask: can't be served")
    qk_dim, v_dim = query.shape[-1], value.shape[-1]
    width = max(qk_dim, v_dim)

    def flat(x: Tensor) -> Tensor:
        x = x[0].transpose(0, 1)
        return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x

    out = paged_attention(
        flat(query),
        flat(key),
        flat(value),
        s_aux,
        int(module.layer_idx),  # type: ignore[arg-type]
        float(scaling if scaling is not None else qk_dim**-0.5),
        int(sliding_window or 0),
        float(softcap or 0.0),
    )
    return out[..., :v_dim].unsqueeze(0) if v_dim < width else out.unsqueeze(0), None


def _check_rope(config: Any) -> None:
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    inner = {one.get("rope_type") for one in rope.values() if isinstance(one, dict)}
    for kind in ("dynamic", "longrope"):
        if kind in inner or rope.get("rope_type") == kind == "dynamic":
            raise ModelError(
                f"rope type {kind!r} depends on the length of each sequence and can't be served yet"
            )


def _settle_rope(config: Any, long: bool) -> None:
    """One set of frequencies for all sequences, where transformers takes the short ones or the long ones by
    a batch's longest: keys that are kept must go with those to come."""
    rope = config.get_text_config(decoder=True).rope_parameters
    chosen = rope["long_factor" if long else "short_factor"]
    rope["long_factor"] = rope["short_factor"] = chosen


def _real_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Values of all buffers that are not in checkpoints, computed as transformers does on loading."""
    values: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        own = {
            name: buffer
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set
        }
        if not own:
            continue
        for name, buffer in own.items():
            module._buffers[name] = (
                torch.full_like(buffer, float("nan"), device="cpu")
                if (buffer.is_floating_point())
                else torch.zeros_like(buffer, device="cpu")
            )
        model._init_weights(module)  # type: ignore[operator]
        for name, buffer in own.items():
            value = module._buffers[name]
            if value is None or (value.is_floating_point() and value.isnan().any()):
                raise ModelError(
                    f"the buffer {prefix}.{name} is in no checkpoint and can't be computed"
                )
            values[f"model.{prefix}.{name}" if prefix else f"model.{name}"] = value
            module._buffers[name] = buffer
    return values
