"""Paged attention in standard ONNX operators, for a whole program as one model.

The cache is only read: a row's blocks are gathered into a temporary, the step's own keys and values
are scattered into that, and handed out for the host to write to the cache. A model that wrote the
cache itself would copy all of it at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halyard.compiler.graphs.onnx_arithmetic import smallest
from halyard.compiler.graphs.onnx_translate import Translator, result

__all__ = ["PagedAttention"]

_END = torch.iinfo(torch.int64).max


class PagedAttention:
    """Declares the inputs that describe a step, and translates the attention of each layer.

    What all layers share, masks and places, is computed once.
    """

    def __init__(
        self,
        translator: Translator,
        input_ids: str,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self._t = t = translator
        self._kv_heads, self._dim, self._dtype = num_kv_heads, head_dim, dtype
        self.new_keys: dict[int, str] = {}  # by layer: [tokens, kv_heads, head_dim]
        self.new_values: dict[int, str] = {}
        self._masks: dict[int, str] = {}  # by window
        add = t.graph.add_input
        tables = add("block_tables", torch.int32, ["rows", "blocks_per_row"])
        lengths = add("seq_lens", torch.int32, ["rows"])
        query_start = add("query_start", torch.int32, ["rows_plus_1"])
        shape: list[int | str] = [num_layers, "num_blocks", "block_size", num_kv_heads, head_dim]
        caches = [add(name, dtype, shape) for name in ("key_cache", "value_cache")]

        bounds, lengths, tables = (
            t.tensor_as(name, torch.int64) for name in (query_start, lengths, tables)
        )
        begins = self._slice(bounds, 0, -1)
        ends = self._slice(bounds, 1, _END)
        counts = t.op("Sub", ends, begins)
        self._queries = t.op("ReduceMax", counts, t.ints([0]), keepdims=1)  # [1], of any row
        self._rows = t.op("Shape", lengths)
        block_size = t.op("Shape", caches[0], start=2, end=3)
        per_row = t.op("Shape", tables, start=1, end=2)
        self._keys = t.op("Mul", per_row, block_size)  # [1], a row's places for keys
        past = t.op("Sub", lengths, counts)

        tokens = self._range(t.op("Shape", input_ids))
        after = t.op("GreaterOrEqual", self._wide(tokens, 1), self._wide(ends, 0))
        row = t.op("ReduceSum", t.tensor_as(after, torch.int64), t.ints([1]), keepdims=0)
        offset = t.op("Sub", tokens, t.op("Gather", begins, row))
        # Where a token's query stands among the padded queries, and its key among the gathered.
        self._query_place = t.op("Add", t.op("Mul", row, self._queries), offset)
        position = t.op("Add", t.op("Gather", past, row), offset)
        self._key_place = self._wide(t.op("Add", t.op("Mul", row, self._keys), position), 1)

        query_positions = t.op("Add", self._wide(past, 1), self._range(self._queries))
        self._distance = t.op(  # [rows, queries, keys]
            "Sub", self._wide(query_positions, 2), self._range(self._keys)
        )
        self._tables = t.op("Max", tables, t.ints(0))  # padding reads block 0, and is masked
        self._num_blocks = t.op("Shape", caches[0], start=1, end=2)
        blocks = self._shape(-1, block_size, num_kv_heads, head_dim)
        self._caches = [t.op("Reshape", cache, blocks) for cache in caches]

    def __call__(self, t: Translator, node: fx.Node) -> str:
        """Translate one halyard::paged_attention."""
        arguments: Any = node.args
        sinks, layer, scale, window, softcap = arguments[3:]
        q, k, v = (t.tensor(argument) for argument in arguments[:3])
        heads, groups = int(result(node).shape[1]), int(result(node).shape[1]) // self._kv_heads
        self.new_keys[layer], self.new_values[layer] = k, v
        keys, values = self._gathered(layer, 0, k), self._gathered(layer, 1, v)

        # Queries, padded to the longest row; the heads of a group share a product's rows.
        scaled = t.op("Mul", q, t.tensor(scale, self._dtype))
        count = t.op("Mul", self._rows, self._queries)
        empty = t.op("Expand", t.tensor(0.0, self._dtype), self._shape(count, heads, self._dim))
        padded = t.op("ScatterND", empty, self._wide(self._query_place, 1), scaled)
        grouped = t.op(
            "Transpose",
            t.op(
                "Reshape",
                padded,
                self._shape(self._rows, self._queries, self._kv_heads, groups, self._dim),
            ),
            perm=[0, 2, 3, 1, 4],
        )
        folded = t.op("Reshape", grouped, t.ints([0, 0, -1, self._dim]))
        scores = t.op("MatMul", folded, t.op("Transpose", keys, perm=[0, 2, 3, 1]))
        scores = t.op(
            "Reshape", scores, self._shape(self._rows, self._kv_heads, groups, -1, self._keys)
        )
        weights = t.tensor_as(
            self._probabilities(t.tensor_as(scores, torch.float32), sinks, window, softcap, heads),
            self._dtype,
        )
        weights = t.op("Reshape", weights, self._shape(self._rows, self._kv_heads, -1, self._keys))
        found = t.op("MatMul", weights, t.op("Transpose", values, perm=[0, 2, 1, 3]))
        found = t.op(
            "Reshape",
            found,
            self._shape(self._rows, self._kv_heads, groups, -1, self._dim),
        )
        found = t.op("Transpose", found, perm=[0, 3, 1, 2, 4])
        flat = t.op("Reshape", found, t.ints([-1, heads, self._dim]))
        return t.op("Gather", flat, self._query_place, axis=0)

    def _gathered(self, layer: int, which: int, new: str) -> str:
        """[rows, keys, kv_heads, head_dim] of one layer, the step's own included."""
        t = self._t
        blocks = self._tables
        if layer:
            blocks = t.op("Add", blocks, t.op("Mul", self._num_blocks, t.ints([layer])))
        old = t.op("Gather", self._caches[which], blocks, axis=0)
        flat = t.op("Reshape", old, t.ints([-1, self._kv_heads, self._dim]))
        whole = t.op("ScatterND", flat, self._key_place, new)
        return t.op(
            "Reshape", whole, self._shape(self._rows, self._keys, self._kv_heads, self._dim)
        )

    def _probabilities(
        self, scores: str, sinks: fx.Node | None, window: int, softcap: float, heads: int
    ) -> str:
        """Softmax over the keys that a query may see: [rows, kv_heads, groups, queries, keys]."""
        t = self._t
        if softcap:
            cap = t.tensor(softcap, torch.float32)
            scores = t.op("Mul", t.op("Tanh", t.op("Div", scores, cap)), cap)
        hidden = t.tensor(smallest(torch.float32), torch.float32)
        scores = t.op("Where", self._mask(window), scores, hidden)
        if sinks is None:
            return t.op("Softmax", scores, axis=-1)
        per_head = t.op(
            "Reshape",
            t.tensor(sinks, torch.float32),
            t.ints([1, self._kv_heads, heads // self._kv_heads, 1, 1]),
        )
        one = self._shape(self._rows, 1, 1, self._queries, 1)
        joined = t.op("Concat", scores, t.op("Expand", per_head, one), axis=-1)
        shares = t.op("Softmax", joined, axis=-1)
        return t.op("Slice", shares, t.ints([0]), t.ints([-1]), t.ints([-1]))

    def _mask(self, window: int) -> str:
        """[rows, 1, 1, queries, keys]: which keys a query may see."""
        if window not in self._masks:
            t = self._t
            seen = t.op("GreaterOrEqual", self._distance, t.ints(0))
            if window:
                seen = t.op("And", seen, t.op("Less", self._distance, t.ints(window)))
            self._masks[window] = t.op("Unsqueeze", seen, t.ints([1, 2]))
        return self._masks[window]

    def _shape(self, *sizes: int | str) -> str:
        parts = [self._t.ints([size]) if isinstance(size, int) else size for size in sizes]
        return self._t.op("Concat", *parts, axis=0)

    def _slice(self, name: str, start: int, stop: int) -> str:
        return self._t.op("Slice", name, self._t.ints([start]), self._t.ints([stop]))

    def _wide(self, name: str, axis: int) -> str:
        return self._t.op("Unsqueeze", name, self._t.ints([axis]))

    def _range(self, count: str) -> str:
        """0 .. count - 1; `count` has shape [1]."""
        t = self._t
        return t.op("Range", t.ints(0), t.op("Squeeze", count, t.ints([0])), t.ints(1))
