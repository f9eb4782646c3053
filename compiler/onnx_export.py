"""A model as ONNX files for use elsewhere.

DIRECTORY/model.onnx             the whole program; reads a paged KV cache, hands out new KV
          weights.safetensors    the weights of model.onnx and of the segments
          program.json           facts, segments, and the order in which they run
          segments/segment-0.onnx ...   what lies between two attentions, for a host with
                                 attention kernels of its own
          model.paged_attention.onnx   if asked for: the whole program with ONNX Runtime's own paged
                                 attention, which its CUDA provider has
          README.md              every input and output, and an example that runs
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

import halyard
from halyard.compiler.graph import ModelGraph, WeightRecipe
from halyard.compiler.graphs.onnx_graph import OPSET, OnnxGraph, onnx_dtype
from halyard.compiler.graphs.onnx_paged import PagedAttention
from halyard.compiler.graphs.onnx_paged_node import PagedAttentionNode
from halyard.compiler.graphs.onnx_segment import segment_model
from halyard.compiler.graphs.onnx_translate import Handler, Translator
from halyard.compiler.onnx_readme import readme
from halyard.compiler.pipeline import run_passes
from halyard.compiler.program import HeadShape
from halyard.compiler.segments import SegmentCall, SegmentedGraph, split
from halyard.compiler.trace import trace
from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import BackendUnavailableError, ConfigError
from halyard.hal.types import DType, WeightInfo

__all__ = ["ExportFacts", "check_directory", "check_onnx", "export_onnx"]

_PASSES = ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input")
_WEIGHTS = "weights.safetensors"
_MODEL = "model.onnx"
_PAGED_MODEL = "model.paged_attention.onnx"


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """What the files say of the model."""

    name: str
    architecture: str
    dtype: DType
    vocab_size: int
    max_model_len: int
    heads: HeadShape
    windows: tuple[int, ...]  # of each attention layer; 0: none
    eos_token_ids: tuple[int, ...]
    paged_attention: bool = False  # with model.paged_attention.onnx; float16 only


def check_onnx() -> None:
    """Raise BackendUnavailableError, with the line that mends it, if onnx is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f'exporting needs onnx ({error}): pip install "halyard[onnx]"'
        ) from None


def check_directory(directory: Path) -> None:
    """Raise ConfigError unless `directory` is new or an empty folder, in a folder that exists."""
    try:
        if directory.is_dir():
            if any(directory.iterdir()):
                raise ConfigError(f"{directory} is not empty: give a new or an empty folder")
        elif directory.exists():
            raise ConfigError(f"{directory} is a file: give a new or an empty folder")
        elif not directory.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {directory.absolute().parent}: make it first")
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=_beside(directory)):
            pass
    except OSError as error:
        raise ConfigError(f"can't write to {directory}: {error.strerror or error}") from error


def export_onnx(
    model: nn.Module,
    constants: Mapping[str, Tensor],
    load: Callable[[Mapping[str, WeightInfo]], dict[str, Tensor]],
    directory: Path,
    facts: ExportFacts,
) -> None:
    """Write `directory`, whole or not at all.

    Args:
        model, constants: as for `trace`.
        load: gives the checkpoint's tensors that are asked for.

    Raises:
        ModelError: the model can't be traced or translated.
        ConfigError: the folder can't be written.
    """
    check_onnx()
    check_directory(directory)
    if facts.paged_attention and facts.dtype != "float16":
        raise ConfigError(
            f"ONNX Runtime's paged attention has no {facts.dtype}: give --dtype float16"
        )
    traced = trace(
        model,
        constants,
        name=facts.architecture,
        heads=facts.heads,
        windows=facts.windows,
        device=torch.device("cpu"),
    )
    recipes = {key: WeightRecipe((key,)) for key in (*traced.weights, *traced.constants)}
    graph = ModelGraph(traced.module, recipes)
    graph.clean()
    run_passes(graph, _PASSES)
    segmented = split(graph)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{directory.name}-", dir=_beside(directory)
        ) as made:
            fresh = Path(made) / "export"
            (fresh / "segments").mkdir(parents=True)
            segments = _write_segments(segmented, fresh / "segments")
            needed = {source for recipe in graph.recipes.values() for source in recipe.sources}
            weights = load({key: info for key, info in traced.weights.items() if key in needed})
            _write_weights(graph.recipes, weights, traced.constants, fresh / _WEIGHTS)
            _write_program(graph, facts, fresh)
            if facts.paged_attention:
                _write_paged_program(graph, facts, fresh)
            # The library makes it readable for its owner alone.
            (fresh / _WEIGHTS).chmod((fresh / _MODEL).stat().st_mode)
            description = {
                "format": 1,
                "producer": f"halyard {halyard.__version__}",
                "opset": OPSET,
                **asdict(facts),
                "num_layers": len(facts.windows),
                "weights": _WEIGHTS,
                "segments": segments,
                "calls": _calls(segmented),
                "result": _reference(segmented.result),
                "hidden": _reference(segmented.hidden),
            }
            (fresh / "program.json").write_text(json.dumps(description, indent=1) + "\n")
            (fresh / "README.md").write_text(readme(facts.name, description))
            if directory.is_dir():
                directory.rmdir()
            shutil.move(fresh, directory)
    except OSError as error:
        raise ConfigError(f"can't write to {directory}: {error.strerror or error}") from error


def _beside(directory: Path) -> Path:
    return directory.absolute().parent


def _write_segments(segmented: SegmentedGraph, folder: Path) -> list[dict[str, Any]]:
    described = []
    for number, segment in enumerate(segmented.segments):
        model, facts = segment_model(segment.module)
        file = f"segment-{number}.onnx"
        (folder / file).write_bytes(model.SerializeToString())
        described.append(
            {
                "file": f"segments/{file}",
                "inputs": [value.name for value in model.graph.input],
                "outputs": [output["name"] for output in facts["outputs"]],
            }
        )
    return described


def _calls(segmented: SegmentedGraph) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for call in segmented.calls:
        if isinstance(call, SegmentCall):
            calls.append(
                {
                    "kind": "segment",
                    "segment": call.segment,
                    "inputs": [_reference(name) for name in call.inputs],
                    "outputs": [_reference(name) for name in call.outputs],
                }
            )
        else:
            fields = asdict(call)
            names: dict[str, str | None] = {
                key: _reference(fields.pop(key)) for key in ("q", "k", "v", "output")
            }
            sinks = fields.pop("sinks")
            names["sinks"] = None if sinks is None else _reference(sinks)
            calls.append({"kind": "attention", **names, **fields})
    return calls


def _reference(name: str) -> str:
    """ "input:x" and "weight:x" say what they are; so does "value:x", which a call makes."""
    return name if name.startswith(("input:", "weight:")) else f"value:{name}"


def _write_weights(
    recipes: Mapping[str, WeightRecipe],
    weights: dict[str, Tensor],
    constants: Mapping[str, Tensor],
    file: Path,
) -> None:
    """Apply the recipes; a source is freed after its last use. Empties `weights`."""
    left: dict[str, int] = {}
    for recipe in recipes.values():
        for source in recipe.sources:
            left[source] = left.get(source, 0) + 1
    made: dict[str, Tensor] = {}
    for name, recipe in recipes.items():
        tensors = []
        for source in recipe.sources:
            left[source] -= 1
            if source in constants:
                tensors.append(constants[source])
            else:
                tensors.append(weights[source] if left[source] else weights.pop(source))
        # Memory of its own: the file format refuses tensors that share any.
        made[name] = recipe.make(tensors).clone(memory_format=torch.contiguous_format)
        del tensors
    weights.clear()
    safetensors.torch.save_file(made, file)


def _write_program(graph: ModelGraph, facts: ExportFacts, directory: Path) -> None:
    onnx_graph = OnnxGraph()
    translator = Translator(onnx_graph)
    attention = PagedAttention(
        translator,
        _declare_inputs(onnx_graph),
        num_layers=len(facts.windows),
        num_kv_heads=facts.heads.num_kv_heads,
        head_dim=facts.heads.head_dim,
        dtype=torch_dtype(facts.dtype),
    )
    _translate(graph, translator, attention, facts, directory)
    for name, made in (("new_keys", attention.new_keys), ("new_values", attention.new_values)):
        layers = [
            onnx_graph.op("Unsqueeze", made[layer], onnx_graph.constant([0]))
            for layer in range(len(facts.windows))
        ]
        heads = facts.heads
        shape = (len(facts.windows), "tokens", heads.num_kv_heads, heads.head_dim)
        joined = onnx_graph.op("Concat", *layers, axis=0)
        onnx_graph.add_output(joined, name, torch_dtype(facts.dtype), shape)
    model = onnx_graph.model("program")
    (directory / _MODEL).write_bytes(model.SerializeToString())


def _write_paged_program(graph: ModelGraph, facts: ExportFacts, directory: Path) -> None:
    onnx_graph = OnnxGraph()
    translator = Translator(onnx_graph)
    _declare_inputs(onnx_graph)
    attention = PagedAttentionNode(
        translator,
        num_layers=len(facts.windows),
        num_kv_heads=facts.heads.num_kv_heads,
        head_dim=facts.heads.head_dim,
        dtype=torch_dtype(facts.dtype),
    )
    _translate(graph, translator, attention, facts, directory)
    attention.add_outputs()
    model = onnx_graph.model("paged_program")
    (directory / _PAGED_MODEL).write_bytes(model.SerializeToString())


def _declare_inputs(onnx_graph: OnnxGraph) -> str:
    """The user's inputs stand first, in an order of our own; the name of the first."""
    sizes = {"input_ids": "tokens", "positions": "tokens", "logit_indices": "logit_rows"}
    names = [onnx_graph.add_input(name, torch.int64, [size]) for name, size in sizes.items()]
    return names[0]


def _translate(
    graph: ModelGraph, translator: Translator, attention: Handler, facts: ExportFacts, folder: Path
) -> None:
    """All nodes; weights stay in their file, and the logits go out."""
    translator.extend({"halyard.paged_attention.default": attention})
    places = _places(folder / _WEIGHTS)
    nodes = list(graph.module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder" and "weight" in node.meta:
            name = node.meta["weight"]
            translator.graph.initializers.append(_external(node, places[name]))
            translator.values[node] = node.name
        elif node.op == "placeholder":
            translator.values[node] = node.meta["input"]
        elif node.op == "call_function":
            translator.node(node)
    returned = nodes[-1].args[0]
    logits = returned[0] if isinstance(returned, tuple | list) else returned
    translator.graph.add_output(
        translator.tensor(logits), "logits", logits.meta["val"].dtype,
        ["logit_rows", facts.vocab_size],
    )  # fmt: skip


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Where a safetensors file holds each tensor: offset and length in bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: (8 + length + item["data_offsets"][0], item["data_offsets"][1] - item["data_offsets"][0])
        for name, item in header.items()
        if name != "__metadata__"
    }  # fmt: skip


def _external(node: fx.Node, place: tuple[int, int]) -> Any:
    """A weight that stays in the safetensors file."""
    from onnx import TensorProto

    value = node.meta["val"]
    tensor = TensorProto(
        name=node.name, data_type=onnx_dtype(value.dtype), dims=[int(size) for size in value.shape]
    )
    tensor.data_location = TensorProto.EXTERNAL
    for key, item in (("location", _WEIGHTS), ("offset", place[0]), ("length", place[1])):
        tensor.external_data.add(key=key, value=str(item))
    return tensor
