"""torch.export over a flat token batch: one graph for prefill, chunks and decode alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from halyard.hal import ops
from halyard.hal.dtypes import dtype_name
from halyard.hal.errors import ModelError
from halyard.hal.types import WeightInfo

__all__ = ["TracedModel", "retarget", "trace"]

INPUT_NAMES = ("input_ids", "positions", "logit_indices")


@dataclass(frozen=True, slots=True)
class TracedModel:
    """The model as one graph whose weights are inputs.

    Placeholders are the three user inputs (INPUT_NAMES) and weights; a weight's placeholder has its
    name in meta["weight"]. The graph's outputs are the logits of the rows at logit_indices
    [rows, vocab] and the hidden states of all tokens [tokens, hidden].
    """

    module: fx.GraphModule
    weights: dict[str, WeightInfo]  # what must come from the checkpoint, by its name there
    constants: dict[str, Tensor]  # small tensors made by the model itself, e.g. rotary frequencies


def trace(
    model: nn.Module,
    constants: Mapping[str, Tensor],
    *,
    name: str,
    num_layers: int,
    device: torch.device,
) -> TracedModel:
    """Trace a model without its weights, for tensors that live on `device`.

    Args:
        model: models.adapter.TraceableModel, on the meta device.
        constants: values of buffers that no checkpoint holds, by their path in `model`.
        name: for messages.
        num_layers: attention layers that the graph must show.

    Raises:
        ModelError: it can't be traced, or some of its attention goes around our operator.
    """
    tokens = torch.export.Dim("ntok", min=1, max=1 << 20)
    rows = torch.export.Dim("nrow", min=1, max=1 << 20)
    # Three different lengths, none of them 0 or 1: the exporter specialises on those. Distinct
    # tensors: it merges inputs that are one object.
    example = (
        torch.zeros(7, dtype=torch.int64, device="meta"),
        torch.zeros(7, dtype=torch.int64, device="meta"),
        torch.zeros(3, dtype=torch.int64, device="meta"),
    )
    try:
        with torch.no_grad():
            exported = torch.export.export(
                model,
                example,
                dynamic_shapes=({0: tokens}, {0: tokens}, {0: rows}),
                strict=False,
            )
    except ModelError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{name} can't be traced: {reason}") from error
    module = exported.graph_module
    retarget(module, device)
    _check_attention(module, name, num_layers)

    weights: dict[str, WeightInfo] = {}
    values: dict[str, Tensor] = {}
    nodes: dict[str, fx.Node] = {}
    canonical = _canonical_names(model)
    placeholders = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    for item in exported.graph_signature.input_specs:
        node = placeholders[item.arg.name]
        if item.kind is InputKind.USER_INPUT:
            continue
        target = item.target
        if target is None:
            raise ModelError(f"{name} has an input that can't be served: {item.kind}")
        if target in constants:
            node.meta["weight"] = target.removeprefix("model.")
            values[node.meta["weight"]] = constants[target].to(device)
        elif item.kind is InputKind.CONSTANT_TENSOR:
            value = exported.constants[target]
            if value.is_meta:
                raise ModelError(f"{name} makes a constant that can't be traced")
            node.meta["weight"] = target
            values[target] = value.detach().to(device)
        else:
            weight = canonical[target]
            if weight in weights:  # tied: the graph may name one tensor twice
                node.replace_all_uses_with(nodes[weight])
                module.graph.erase_node(node)
                del placeholders[node.name]
                continue
            nodes[weight] = node
            node.meta["weight"] = weight
            value = node.meta["val"]
            weights[weight] = WeightInfo(tuple(value.shape), dtype_name(value.dtype))
    for node, input_name in zip(
        [n for n in placeholders.values() if "weight" not in n.meta], INPUT_NAMES, strict=True
    ):
        node.meta["input"] = input_name
    return TracedModel(module, weights, values)


def retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Turn a graph over meta tensors into one over tensors on `device`."""

    def move(value: object) -> object:
        if isinstance(value, torch.device) and value.type == "meta":
            return device
        if isinstance(value, torch._subclasses.FakeTensor):
            with value.fake_mode:
                return torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=device
                )
        return value

    for node in module.graph.nodes:
        node.args = pytree.tree_map(move, node.args)
        node.kwargs = pytree.tree_map(move, node.kwargs)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(move, node.meta["val"])
    module.recompile()


def _canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Every parameter's and buffer's path -> its name in a checkpoint; tied ones share one name."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for path, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names[path] = first.setdefault(id(tensor), path.removeprefix("model."))
    return names


def _check_attention(module: fx.GraphModule, name: str, num_layers: int) -> None:
    """A model that bypasses the interface exports well and answers wrongly: refuse it."""
    nodes = [node for node in module.graph.nodes if node.target is ops.paged_attention]
    layers = sorted(node.args[4] for node in nodes)
    if layers != list(range(num_layers)):
        raise ModelError(
            f"{name} routes {len(nodes)} of its {num_layers} attention layers "
            "through transformers' attention interface; it would answer wrongly and is refused"
        )
