"""Checkpoints in MXFP4 and FP8 are served as what they unpack to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from halyard import LLM, SamplingParams
from halyard.hal.errors import ModelError
from halyard.hal.types import WeightInfo
from halyard.models.source import resolve_source
from halyard.models.spec import ModelSpec
from halyard.models.tiny import FAMILIES, tiny_model
from halyard.models.unpack import unpack_fp8, unpack_mxfp4
from halyard.models.weights import load_weights

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6] * 9]


def test_each_4_bit_number_has_its_place() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 5, 3), dtype=torch.uint8, generator=generator)
    found = unpack_mxfp4(blocks, scales, torch.bfloat16)
    assert found.shape == (2, 96, 5)
    assert found.is_contiguous()
    for expert, place, out in [(0, 0, 0), (0, 1, 0), (1, 33, 4), (1, 95, 2), (0, 62, 3)]:
        group, number = divmod(place, 32)
        byte = int(blocks[expert, out, group, number // 2])
        code = byte >> 4 if number % 2 else byte & 15
        want = (
            FP4[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(scales[expert, out, group]) - 127)
        )
        assert found[expert, place, out].item() == want
    with pytest.raises(ModelError, match="download the checkpoint again"):
        unpack_mxfp4(blocks, scales[:, :4], torch.bfloat16)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 129), (257, 5)])
def test_each_8_bit_number_has_its_blocks_factor(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    factors = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.5
    found = unpack_fp8(weight, factors, torch.float32)
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)]:
        want = weight[row, column].float() * factors[row // 128, column // 128]
        assert found[row, column] == want
    with pytest.raises(ModelError, match="blocks of 128 x 128"):
        unpack_fp8(weight, torch.ones(9, 9), torch.float32)


def packed(folder: Path, family: str, facts: dict[str, Any], pack: Callable[..., Any],
           monkeypatch: pytest.MonkeyPatch, **sizes: int) -> tuple[Path, Path]:  # fmt: skip
    """A tiny model's checkpoint, plain with the numbers that packing leaves, and packed."""
    name, changes = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (name, changes | sizes))
    model = tiny_model(family)
    before, after = folder / "plain", folder / "packed"
    for place in (before, after):
        model.save_pretrained(place)
    plain: dict[str, Tensor] = load_file(before / "model.safetensors")
    small: dict[str, Tensor] = {}
    for key, value in list(plain.items()):
        parts, rounded = pack(key, value)
        small |= parts
        plain[key] = rounded
    save_file(plain, before / "model.safetensors", {"format": "pt"})
    save_file(small, after / "model.safetensors", {"format": "pt"})
    config = json.loads((after / "config.json").read_text())
    (after / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    return before, after


def pack_mxfp4(name: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: value}, value
    experts, width, out = value.shape
    generator = torch.Generator().manual_seed(len(name) + out)
    size = (experts, out, width // 32)
    blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(122, 126, size, dtype=torch.uint8, generator=generator)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).reshape(*size, 32).long()
    numbers = torch.tensor(FP4 + [-n for n in FP4])[codes] * 2.0 ** (scales[..., None] - 127.0)
    rounded = numbers.reshape(experts, out, width).transpose(1, 2).contiguous()
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, rounded


def pack_fp8(name: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    if value.dim() != 2 or not name.endswith("proj.weight"):
        return {name: value}, value
    rows, columns = value.shape
    grid = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    grid[:rows, :columns] = value
    tiles = grid.reshape(grid.shape[0] // 128, 128, -1, 128)
    factors = tiles.abs().amax((1, 3)).clamp(min=1e-6) / 448
    wide = factors.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    small = (value / wide).to(torch.float8_e4m3fn)
    return {name: small, f"{name}_scale_inv": factors}, small.float() * wide


def greedy(folder: Path) -> tuple[list[list[int]], int]:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(folder, backend="cpu-eager", dtype="float32", kv_blocks=64) as llm:
        found = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params)]
        return found, llm.plan.num_parameters


def hugging_face(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize(
    ("family", "facts", "pack", "sizes"),
    [
        ("gpt-oss", MXFP4, pack_mxfp4, {"hidden_size": 64, "intermediate_size": 96}),
        ("qwen3", FP8, pack_fp8, {"hidden_size": 144, "intermediate_size": 208}),
        ("qwen3-moe", FP8, pack_fp8, {"hidden_size": 144, "moe_intermediate_size": 80}),
    ],
)
def test_a_packed_checkpoint_answers_as_what_it_unpacks_to(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    facts: dict[str, Any],
    pack: Callable[..., Any],
    sizes: dict[str, int],
) -> None:
    plain, small = packed(tmp_path, family, facts, pack, monkeypatch, **sizes)
    spec = ModelSpec.load(resolve_source(small))
    assert spec.packing == facts["quant_method"]
    assert spec.digest() == ModelSpec.load(resolve_source(plain)).digest()
    tokens, parameters = greedy(small)
    assert (tokens, parameters) == greedy(plain)
    assert tokens == hugging_face(plain)


def test_what_can_not_be_unpacked_is_refused() -> None:
    for facts in (
        {"quant_method": "awq", "bits": 4},
        FP8 | {"weight_block_size": [64, 64]},
        {"quant_method": "fp8", "weight_block_size": None},
    ):
        with pytest.raises(ModelError, match=f"quantised .{facts['quant_method']}") as error:
            ModelSpec.from_hf(LlamaConfig(quantization_config=facts))
        assert "\n" not in str(error.value)


def test_stacked_matrices_in_fp8_are_refused(tmp_path: Path) -> None:
    """Nobody has said what blocks of three dimensions are."""
    LlamaConfig().save_pretrained(tmp_path)
    stacked = torch.ones(2, 4, 4).to(torch.float8_e4m3fn)
    tensors = {"w": stacked, "w_scale_inv": torch.ones(2, 1, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = resolve_source(tmp_path)
    want = {"w": WeightInfo((2, 4, 4), "float32")}
    with pytest.raises(ModelError, match="holds w as F8_E4M3") as error:
        load_weights(source, ModelSpec.load(source), want, "float32")
    assert "\n" not in str(error.value)


def test_weights_without_their_scales_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, small = packed(tmp_path, "qwen3", FP8, pack_fp8, monkeypatch, hidden_size=144)
    tensors = load_file(small / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("_scale_inv"))
    del tensors[lost]
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(ModelError) as error:
        greedy(small)
    assert lost.removesuffix("_scale_inv") in str(error.value)
    assert "\n" not in str(error.value)
