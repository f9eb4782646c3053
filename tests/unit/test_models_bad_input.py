"""Checkpoints that can't be served: one clear line each, and no traceback of a library's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MiMoV2FlashConfig,
    PhimoeConfig,
    PretrainedConfig,
    T5Config,
)

from halyard.compiler.program import HeadShape
from halyard.compiler.trace import trace
from halyard.hal.errors import ModelError
from halyard.hal.types import DType, WeightInfo
from halyard.models.adapter import TraceableModel, build_meta_module
from halyard.models.headers import check_checkpoint
from halyard.models.source import ModelSource, resolve_source
from halyard.models.spec import ModelSpec
from halyard.models.tokenizer import load_tokenizer
from halyard.models.weights import load_weights

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> ModelSource:
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    return resolve_source(tmp_path)


def wanted(**shapes: tuple[int, ...]) -> dict[str, WeightInfo]:
    return {name: WeightInfo(shape, "float32") for name, shape in shapes.items()}


def load(source: ModelSource, want: dict[str, WeightInfo]) -> dict[str, torch.Tensor]:
    return load_weights(source, ModelSpec.load(source), want, "float32")


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nothing/here", "a/b/c", ""])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(ModelError, match="no such model folder") as error:
        resolve_source(name)
    one_line(error)


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no folder here") as error:
        resolve_source("nobody/no-such-model")
    one_line(error)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no config\.json.*\.gguf"):
        resolve_source(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        resolve_source(tmp_path / "weights.gguf")


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ModelError, match="config") as error:
        ModelSpec.load(resolve_source(tmp_path))
    one_line(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", -4),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 0),
        ("max_position_embeddings", "many"),
        ("eos_token_id", "x"),
        ("dtype", "float9"),
    ],
)
def test_a_config_with_a_field_that_makes_no_sense(
    checkpoint: ModelSource, field: str, value: Any
) -> None:
    path = checkpoint.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ModelError, match="the config of") as error:
        ModelSpec.load(checkpoint)
    one_line(error)


@pytest.mark.parametrize("value", ["x", [1, "x"], 1.5, True, {"a": 1}])
def test_a_generation_config_whose_end_is_no_token(checkpoint: ModelSource, value: Any) -> None:
    (checkpoint.path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelError, match="eos_token_id must be a token id or a list") as error:
        ModelSpec.load(checkpoint)
    one_line(error)


@pytest.mark.parametrize("text", ["[1]", "7", "[]"])
def test_settings_that_are_no_json_object(checkpoint: ModelSource, text: str) -> None:
    (checkpoint.path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json is no JSON object"):
        ModelSpec.load(checkpoint)
    (checkpoint.path / "tokenizer.json").write_text("{}")
    (checkpoint.path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is no JSON object"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize("names", [{"a": 7}, {"a": None}, {"a": ["model.safetensors"]}, [1]])
def test_an_index_that_names_no_files(checkpoint: ModelSource, names: Any) -> None:
    index = checkpoint.path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"index\.json is corrupt .*download it again") as error:
        check_checkpoint(checkpoint)
    one_line(error)
    index.write_text("[1]")
    with pytest.raises(ModelError, match=r"index\.json is corrupt"):
        check_checkpoint(checkpoint)


def test_whole_weights_load_and_are_copies(checkpoint: ModelSource) -> None:
    weights = load(checkpoint, wanted(a=(4, 4)))
    assert torch.equal(weights["a"], torch.ones(4, 4))
    (checkpoint.path / "model.safetensors").write_bytes(b"")
    assert torch.equal(weights["a"], torch.ones(4, 4))


@pytest.mark.parametrize("keep", [0, 7, 40, -1, -20])
def test_a_file_that_is_cut_short(checkpoint: ModelSource, keep: int) -> None:
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors.*download it again") as error:
        load(checkpoint, wanted(a=(4, 4)))
    one_line(error)


def test_a_corrupt_header(checkpoint: ModelSource) -> None:
    file = checkpoint.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"]]]]"
    file.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="corrupt header"):
        check_checkpoint(checkpoint)
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelError, match="cut short"):
        check_checkpoint(checkpoint)


def test_a_missing_shard(checkpoint: ModelSource) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (checkpoint.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files \(other\.safetensors\)"):
        check_checkpoint(checkpoint)


def test_no_weights_at_all(checkpoint: ModelSource) -> None:
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--load-format dummy"):
        check_checkpoint(checkpoint)
    (checkpoint.path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"only \.bin"):
        check_checkpoint(checkpoint)


def test_weights_of_another_model(checkpoint: ModelSource) -> None:
    with pytest.raises(ModelError, match="doesn't fit its config") as error:
        load(checkpoint, wanted(c=(2, 2)))
    one_line(error)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (MambaConfig(num_hidden_layers=1), "recurrent state|no num_attention_heads"),
    ],
    ids=["t5", "mamba"],
)
def test_architectures_that_are_refused(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        ModelSpec.from_hf(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
        ({"num_kv_shared_layers": 1}, "share keys and values"),
    ],
    ids=["chunked", "quantised", "shared"],
)
def test_configs_that_would_answer_wrongly(changes: dict[str, Any], reason: str) -> None:
    """Each of these traces well: nothing but the config tells."""
    config = LlamaConfig(**TINY)
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(ModelError, match=reason) as error:
        ModelSpec.from_hf(config)
    one_line(error)


def test_weights_in_eight_bits_are_refused(checkpoint: ModelSource) -> None:
    """Their scales are tensors of their own: cast alone they are noise."""
    file = checkpoint.path / "model.safetensors"
    save_file({"a": torch.ones(4, 4).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ModelError, match="F8_E4M3: quantised") as error:
        load(checkpoint, wanted(a=(4, 4)))
    one_line(error)


def test_a_header_that_lies_about_a_shape(checkpoint: ModelSource) -> None:
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[4,4]', b'"shape":[4,5]'))
    with pytest.raises(ModelError, match="corrupt header at a"):
        load(checkpoint, wanted(a=(4, 5)))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_change_on_the_way(
    checkpoint: ModelSource, stored: torch.dtype, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halyard.models.weights._STAGE", 7)  # many reads, the last one shorter
    tensors = {
        "a": torch.randn(5, 9).to(stored),
        "b": torch.randn(()).to(stored),
        "c": torch.empty(0, 3, dtype=stored),
    }
    save_file(tensors, checkpoint.path / "model.safetensors")
    want = {name: WeightInfo(tuple(tensor.shape), dtype) for name, tensor in tensors.items()}
    found = load(checkpoint, want)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype)))


def test_random_weights_repeat_by_seed() -> None:
    want = wanted(matrix=(300, 64), norm=(64,)) | {"bias": WeightInfo((64,), "bfloat16")}
    spec = ModelSpec.from_hf(LlamaConfig(**TINY))
    first, again, other = (
        load_weights(None, spec, want, "float32", load_format="dummy", seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first["matrix"], again["matrix"])
    assert not torch.equal(first["matrix"], other["matrix"])
    assert first["matrix"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert first["norm"].eq(1).all()
    assert first["bias"].eq(0).all()
    assert first["bias"].dtype is torch.bfloat16


def test_rope_that_depends_on_length_is_refused() -> None:
    config = LlamaConfig(
        **TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    with pytest.raises(ModelError, match="'dynamic'"):
        build_meta_module(ModelSpec.from_hf(config), "float32")


def test_an_encoder_is_refused() -> None:
    config = BertConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=64,
    )
    model = build_meta_module(ModelSpec.from_hf(config), "float32")
    with pytest.raises(ModelError, match="later tokens") as error:
        trace_of(ModelSpec.from_hf(config), model)
    one_line(error)


def trace_of(spec: ModelSpec, model: TraceableModel | None = None) -> None:
    model = model or build_meta_module(spec, "float32")
    heads = HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    trace(
        model,
        model.buffers_by_name,
        name=spec.architecture,
        heads=heads,
        windows=spec.windows,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("wrong", [{"num_key_value_heads": 1}, {"head_dim": 8}])
def test_heads_that_are_not_the_configs_are_refused(wrong: dict[str, int]) -> None:
    """GPT-2 knows neither field: memory would be laid out for other heads than are written."""
    config = GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64)
    trace_of(ModelSpec.from_hf(config))
    for field, value in wrong.items():
        setattr(config, field, value)
    with pytest.raises(ModelError, match=r"attention layer 0 of .* has 2 query heads") as error:
        trace_of(ModelSpec.from_hf(config))
    one_line(error)


def test_layers_whose_heads_differ_are_refused() -> None:
    config = MiMoV2FlashConfig(
        **TINY | {"num_hidden_layers": 2},
        head_dim=16,
        v_head_dim=16,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "dense"],
    )
    with pytest.raises(ModelError, match=r"attention layer 1 of .* its layers differ") as error:
        trace_of(ModelSpec.from_hf(config))
    one_line(error)


def test_a_window_that_only_the_mask_knows_is_refused() -> None:
    sizes = TINY | {"num_local_experts": 2, "num_experts_per_tok": 2}
    with pytest.raises(ModelError, match="window of 8 tokens") as error:
        trace_of(ModelSpec.from_hf(PhimoeConfig(**sizes, sliding_window=8)))
    one_line(error)
    longer = PhimoeConfig(**sizes, sliding_window=64, max_position_embeddings=64)
    trace_of(ModelSpec.from_hf(longer))  # nothing is ever outside it


def test_a_model_that_looks_into_tensors_is_refused() -> None:
    class Looking(TraceableModel):
        def forward(self, input_ids: Tensor, positions: Tensor, logit_indices: Tensor) -> Any:
            logits, hidden = super().forward(input_ids, positions, logit_indices)
            return logits * positions.max().item(), hidden

    spec = ModelSpec.from_hf(LlamaConfig(**TINY))
    built = build_meta_module(spec, "float32")
    with pytest.raises(ModelError, match="looks into tensors") as error:
        trace_of(spec, Looking(built.model, built.buffers_by_name).eval())
    one_line(error)


def test_a_model_that_counts_positions_itself_is_refused() -> None:
    class Counting(TraceableModel):
        def forward(self, input_ids: Tensor, positions: Tensor, logit_indices: Tensor) -> Any:
            counted = torch.arange(input_ids.shape[0], device=input_ids.device)
            return super().forward(input_ids, counted, logit_indices)

    spec = ModelSpec.from_hf(LlamaConfig(**TINY))
    built = build_meta_module(spec, "float32")
    with pytest.raises(ModelError, match="positions itself") as error:
        trace_of(spec, Counting(built.model, built.buffers_by_name).eval())
    one_line(error)


def test_a_broken_tokenizer(checkpoint: ModelSource) -> None:
    assert load_tokenizer(checkpoint) is None
    (checkpoint.path / "tokenizer.json").write_text('{"version": "1.0"')
    (checkpoint.path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(ModelError, match="tokenizer") as error:
        load_tokenizer(checkpoint)
    one_line(error)
