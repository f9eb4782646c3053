"""The page that goes with an ONNX export: what is in it, and how to run it."""

from __future__ import annotations

from typing import Any

__all__ = ["readme"]

_PAGE = """# {name} as ONNX

{architecture}, {num_layers} layers, {heads} query heads over {kv_heads} kv heads of {dim},
vocabulary {vocab}, {dtype}. Written by {producer}; ONNX opset {opset}.

| file | what it is |
|---|---|
| `model.onnx` | the whole model, one graph for prefill, chunks and decode alike |
| `weights.safetensors` | its weights (`model.onnx` refers to them: keep both in one folder) |
| `program.json` | facts, and how the segments run |
| `segments/` | the model cut at its attentions, for a host with attention kernels of its own |

## model.onnx

A step computes some tokens of some sequences (rows). Row r owns the tokens `query_start[r]` to
`query_start[r + 1] - 1`; they are the last ones of its sequence. A prompt, a piece of a prompt and a
single new token are all just tokens, and rows of each kind may share a step.

Keys and values live in blocks of any size you choose. The model reads them through `block_tables`
and never writes them: it hands out those of this step, and you put them in their places (the
example does it in one line). The places of a row must exist before the step: its table has to hold
at least `seq_lens[r]` places. Contents of unused places are ignored, but must be finite: start from
zeros.

| input | type and shape | meaning |
|---|---|---|
| `input_ids` | int64 [tokens] | the tokens of all rows, one row after the other |
| `positions` | int64 [tokens] | each token's position in its sequence, from 0 |
| `logit_indices` | int64 [logit_rows] | which of the tokens need logits (usually each row's last) |
| `block_tables` | int32 [rows, blocks_per_row] | each row's blocks in order; pad with -1 |
| `seq_lens` | int32 [rows] | tokens of each sequence, those of this step included |
| `query_start` | int32 [rows + 1] | where each row's tokens begin, and the number of tokens |
| `key_cache` | {dtype} [{num_layers}, num_blocks, block_size, {kv_heads}, {dim}] | keys so far |
| `value_cache` | as `key_cache` | values so far |

| output | type and shape | meaning |
|---|---|---|
| `logits` | {dtype} [logit_rows, {vocab}] | of the token after each chosen one |
| `new_keys` | {dtype} [{num_layers}, tokens, {kv_heads}, {dim}] | of this step's tokens, to be put in the cache |
| `new_values` | as `new_keys` | likewise |

The token at position p of a row belongs to block `block_tables[row, p // block_size]`, place
`p % block_size` in it.

### Example

Needs `numpy` and `onnxruntime` only. Greedy, one sequence; run it in this folder.

```python
import sys

import numpy as np
import onnxruntime

LAYERS, KV_HEADS, DIM, EOS = {num_layers}, {kv_heads}, {dim}, {eos}
BLOCK, NUM_BLOCKS, NEW_TOKENS = 16, 64, 16

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
keys = np.zeros((LAYERS, NUM_BLOCKS, BLOCK, KV_HEADS, DIM), np.{dtype})
values = np.zeros_like(keys)
table = np.arange(NUM_BLOCKS, dtype=np.int32)  # any order will do; one sequence may take all


def step(tokens, past):
    \"\"\"Compute `tokens`, which follow `past` earlier ones; the logits after the last of them.\"\"\"
    positions = np.arange(past, past + len(tokens))
    logits, new_keys, new_values = session.run(None, {{
        "input_ids": np.array(tokens, np.int64),
        "positions": positions.astype(np.int64),
        "logit_indices": np.array([len(tokens) - 1], np.int64),
        "block_tables": table[None, : -(-(past + len(tokens)) // BLOCK)],
        "seq_lens": np.array([past + len(tokens)], np.int32),
        "query_start": np.array([0, len(tokens)], np.int32),
        "key_cache": keys,
        "value_cache": values,
    }})
    keys[:, table[positions // BLOCK], positions % BLOCK] = new_keys
    values[:, table[positions // BLOCK], positions % BLOCK] = new_values
    return logits[0]


prompt = [int(word) for word in sys.argv[1:]] or [1, 2, 3]  # token ids
logits, past, answer = step(prompt, 0), len(prompt), []
while len(answer) < NEW_TOKENS:
    answer.append(int(logits.argmax()))
    if answer[-1] in EOS:
        break
    logits, past = step(answer[-1:], past), past + 1
print(*answer)
```

## segments and program.json

`program.json` lists `calls` in order. Every value has a name: `input:` one of `input_ids`,
`positions`, `logit_indices`; `weight:` a tensor of `weights.safetensors`; `value:` what an earlier
call made. `result` names the logits, `hidden` the hidden states of all tokens after the final norm.

- `"kind": "segment"`: run `segments[segment].file`; `inputs` and `outputs` go in the order of that
  segment's own `inputs` and `outputs`. Layers that are alike share a file and differ in weights.
- `"kind": "attention"`: write `k` and `v` [tokens, {kv_heads}, {dim}] to the cache of `layer`, then
  attend causally with `q` [tokens, {heads}, {dim}], which gives `output` in q's shape. Scores are q.k times
  `scale`; with `softcap` c > 0 they become c * tanh(score / c); with `window` w > 0 a query at
  position i sees the keys at positions j with i - j < w; `sinks`, if not null, names one more logit
  a head that takes part in the softmax and has no value.
"""

_PAGED = """
## model.paged_attention.onnx

The whole model with ONNX Runtime's `com.microsoft.PagedAttention`, which its CUDA provider alone has
(onnxruntime-gpu 1.31 or newer; run with 1.31.1 on an H100). `input_ids`, `positions`, `logit_indices`
and `logits` are as above. The others:

| input | type and shape | meaning |
|---|---|---|
| `query_start` | int32 [rows + 1] | as above |
| `past_lens` | int32 [rows] | tokens of each sequence before this step |
| `block_tables` | int32 [rows, blocks_per_row] | as above |
| `slot_mapping` | int32 [tokens] | a token's block times block_size plus its place; -1: not kept |
| `bounds` | int32 [2], on the host | at least the most new tokens of a row, and the longest sequence |
| `key_cache_N`, `value_cache_N` | {dtype} [num_blocks, block_size, {kv_heads}, {dim}] | of layer N |

The outputs `key_cache_out_N` and `value_cache_out_N` are the same caches, written in place: bind each
to its input's memory. The provider wants blocks of 16 tokens, or of a multiple of 256; a model with
attention sinks needs the latter.
"""


def readme(name: str, description: dict[str, Any]) -> str:
    """README.md of an export; `description` is its program.json."""
    heads = description["heads"]
    page = _PAGE + (_PAGED if description["paged_attention"] else "")
    return page.format(
        name=name,
        architecture=description["architecture"],
        num_layers=description["num_layers"],
        heads=heads["num_heads"],
        kv_heads=heads["num_kv_heads"],
        dim=heads["head_dim"],
        vocab=description["vocab_size"],
        dtype=description["dtype"],
        producer=description["producer"],
        opset=description["opset"],
        eos=list(description["eos_token_ids"]),
    )
