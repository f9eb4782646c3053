"""torch.export over a flat token batch: one graph for prefill, chunks and decode alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from halyard.compiler.program import HeadShape
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
    heads: HeadShape,
    windows: Sequence[int],
    device: torch.device,
) -> TracedModel:
    """Trace a model without its weights, for tensors that live on `device`.

    Args:
        model: models.adapter.TraceableModel, on the meta device.
        constants: values of buffers that no checkpoint holds, by their path in `model`.
        name: for messages.
        heads: what each layer's queries, keys and values must be, as memory is laid out for them.
        windows: each attention layer's window in tokens by the config; 0: none. The graph must show
            as many layers; what is computed is the graph's own window.

    Raises:
        ModelError: it can't be traced, some of its attention goes around our operator, or it isn't
            what its config promises.
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
        if reason.startswith("Constraints violated"):
            reason = "its code works for one number of tokens alone"
        raise ModelError(f"{name} can't be traced: {reason}") from error
    module = exported.graph_module
    retarget(module, device)
    _check_attention(module, name, heads, windows)
    _check_values(module, name)

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
        if input_name == "positions" and not node.users:
            raise ModelError(
                f"{name} counts its tokens' positions itself, which goes wrong where several "
                "sequences share a step; it is refused"
            )
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


def _check_attention(
    module: fx.GraphModule, name: str, heads: HeadShape, windows: Sequence[int]
) -> None:
    """A model that bypasses the interface, or isn't what memory was laid out for, exports well and
    answers wrongly: refuse it."""
    nodes = [node for node in module.graph.nodes if node.target is ops.paged_attention]
    nodes.sort(key=lambda node: node.args[4])
    if [node.args[4] for node in nodes] != list(range(len(windows))):
        raise ModelError(
            f"{name} routes {len(nodes)} of its {len(windows)} attention layers "
            "through transformers' attention interface; it would answer wrongly and is refused"
        )
    for layer, (node, window) in enumerate(zip(nodes, windows, strict=True)):
        query, key, value = (tuple(arg.meta["val"].shape[1:]) for arg in node.args[:3])
        keys = (heads.num_kv_heads, heads.head_dim)
        if (query, key, value) != ((heads.num_heads, heads.head_dim), keys, keys):
            raise ModelError(
                f"attention layer {layer} of {name} has {query[0]} query heads over {key[0]} kv "
                f"heads of {query[1]}, its config says {heads.num_heads} over "
                f"{heads.num_kv_heads} of {heads.head_dim}: the config is wrong, or its layers "
                "differ, which can't be served yet"
            )
        if window and not node.args[6]:
            raise ModelError(
                f"attention layer {layer} of {name} has a window of {window} tokens in its config, "
                "which only its masks know; it would answer wrongly and is refused"
            )


def _check_values(module: fx.GraphModule, name: str) -> None:
    """A graph that asks for a number in a tensor waits for the device, and may have sizes that nobody can
    plan."""
    asks = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
    if any(node.target in asks for node in module.graph.nodes):
        raise ModelError(f"{name} looks into tensors while it runs, and can't be served")
