"""Paged attention as com.microsoft.PagedAttention, which ONNX Runtime's CUDA provider runs.

Each layer has caches of its own, which the node writes in place: bind the output to the input's
memory. The blocks are ours, [num_blocks, block_size, kv_heads, head_dim].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halyard.compiler.graphs.onnx_translate import Translator, result

__all__ = ["DOMAIN", "PagedAttentionNode"]

DOMAIN = "com.microsoft"


class PagedAttentionNode:
    """Declares the inputs that describe a step, and makes a node of the attention of each layer."""

    def __init__(
        self,
        translator: Translator,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self._t = translator
        self._kv_heads, self._dim, self._dtype = num_kv_heads, head_dim, dtype
        add = translator.graph.add_input
        sizes: dict[str, list[int | str]] = {
            "query_start": ["rows_plus_1"],
            "past_lens": ["rows"],
            "block_tables": ["rows", "blocks_per_row"],
            "slot_mapping": ["tokens"],
            "bounds": [2],
        }
        self._step = {name: add(name, torch.int32, shape) for name, shape in sizes.items()}
        self._shape: list[int | str] = ["num_blocks", "block_size", num_kv_heads, head_dim]
        self._caches = [
            (add(f"key_cache_{n}", dtype, self._shape), add(f"value_cache_{n}", dtype, self._shape))
            for n in range(num_layers)
        ]
        self._written: dict[int, tuple[str, str]] = {}

    def __call__(self, t: Translator, node: fx.Node) -> str:
        """Translate one halyard::paged_attention."""
        arguments: Any = node.args
        sinks, layer, scale, window, softcap = arguments[3:]
        heads = int(result(node).shape[1])
        q, k, v = (self._flat(t, argument) for argument in arguments[:3])
        step, caches = self._step, self._caches[layer]
        sink = "" if sinks is None else t.tensor_as(t.tensor(sinks), self._dtype)
        features: dict[str, Any] = {"softcap": float(softcap)} if softcap else {}
        if window:  # the query's own position counts, as ours does
            features["local_window_size"] = int(window)
        out, keys, values = t.graph.ops(
            "PagedAttention",
            q, k, v, *caches, step["query_start"], step["past_lens"], step["block_tables"], "", "",
            step["slot_mapping"], sink, "", "", "", "", step["bounds"],
            num_outputs=3, domain=DOMAIN, num_heads=heads, kv_num_heads=self._kv_heads,
            scale=float(scale), **features,
        )  # fmt: skip
        self._written[layer] = keys, values
        return t.op("Reshape", out, t.ints([-1, heads, self._dim]))

    def add_outputs(self) -> None:
        """Hand the caches out, layer by layer."""
        for layer, names in sorted(self._written.items()):
            for kind, name in zip(("key", "value"), names, strict=True):
                out = f"{kind}_cache_out_{layer}"
                self._t.graph.add_output(name, out, self._dtype, self._shape)

    @staticmethod
    def _flat(t: Translator, argument: Any) -> str:
        return t.op("Reshape", t.tensor(argument), t.ints([0, -1]))
