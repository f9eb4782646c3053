"""Cuts a graph at its attention nodes and merges segments that are alike.

Every node belongs to the segment after the last attention it depends on; cheap nodes without
tensor inputs of their own (aranges, shapes) are repeated where they are used, so that one layer's
leftovers don't make the next layer's segment look different.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from halyard.compiler.graph import ModelGraph
from halyard.compiler.rowwise import token_axes
from halyard.hal import ops

__all__ = ["AttentionCall", "Segment", "SegmentCall", "SegmentedGraph", "split"]


@dataclass(frozen=True, slots=True)
class SegmentCall:
    """One run of a segment: `inputs` and `outputs` name values, weights or user inputs."""

    segment: int  # index of the unique segment
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention: reads values q, k, v (and maybe a weight, sinks) and writes `output`."""

    layer: int
    scale: float
    window: int
    softcap: float
    q: str
    k: str
    v: str
    sinks: str | None
    output: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A unique segment: compiled once, run wherever a SegmentCall names it."""

    module: fx.GraphModule  # placeholders in the order of SegmentCall.inputs; output is a tuple
    key: str  # digest of its canonical print


@dataclass(frozen=True, slots=True)
class SegmentedGraph:
    """The program's structure. Values are named; weights go by their recipe's name."""

    segments: tuple[Segment, ...]
    calls: tuple[SegmentCall | AttentionCall, ...]
    result: str  # the value that holds the logits
    hidden: str  # the value that holds the final hidden states
    token_axes: tuple[int, ...] | None = None  # of the last call's inputs; None: not row by row

    def wiring(self) -> str:
        """The structure as JSON, without the modules."""
        calls = [{"kind": type(call).__name__, **asdict(call)} for call in self.calls]
        return json.dumps({"calls": calls, "result": self.result, "hidden": self.hidden})


def split(graph: ModelGraph) -> SegmentedGraph:
    """Cut `graph` into segments and attention calls."""
    nodes = list(graph.module.graph.nodes)
    level = _levels(nodes)
    cheap = {node for node in nodes if _is_cheap(node)}
    for node in reversed(nodes):  # a cheap node is repeated only together with what it needs
        if node in cheap and not all(
            arg in cheap or arg.op == "placeholder" for arg in node.all_input_nodes
        ):
            cheap.discard(node)
    names = {node: _name(node) for node in nodes}
    attention = [node for node in nodes if node.target is ops.paged_attention]
    results = nodes[-1].args[0]

    calls: list[SegmentCall | AttentionCall] = []
    unique: dict[str, int] = {}
    segments: list[Segment] = []
    for number in range(len(attention) + 1):
        own = [
            n for n in nodes
            if n.op == "call_function" and level[n] == number and n not in cheap
            and n.target is not ops.paged_attention
        ]  # fmt: skip
        inside = set(own)
        wanted = [
            n for n in own
            if n in results or any(u not in inside and u not in cheap for u in n.users)
        ]  # fmt: skip
        module, inputs = _extract(graph.module, own, wanted, cheap)
        key = _canonical(module)
        if key not in unique:
            unique[key] = len(segments)
            segments.append(Segment(module, key))
        calls.append(
            SegmentCall(
                unique[key], tuple(names[n] for n in inputs), tuple(names[n] for n in wanted)
            )
        )
        if number < len(attention):
            calls.append(_attention_call(attention[number], names))
    result, hidden = (names[node] for node in results)
    _mark_donated(segments, calls, (result, hidden))
    ids = next((n for n in nodes if n.meta.get("input") == "input_ids"), None)
    axes = None
    if ids is not None and "val" in ids.meta:
        axes = token_axes(module, inputs, str(ids.meta["val"].shape[0]), "logit_indices")
    return SegmentedGraph(tuple(segments), tuple(calls), result, hidden, axes)


def _mark_donated(
    segments: list[Segment], calls: list[SegmentCall | AttentionCall], kept: tuple[str, ...]
) -> None:
    """meta["donated"] of placeholders whose memory no one reads after any call of their segment."""
    last: dict[str, int] = {}
    for number, call in enumerate(calls):
        read = call.inputs if isinstance(call, SegmentCall) else (call.q, call.k, call.v)
        last |= dict.fromkeys(read, number)
    for index, segment in enumerate(segments):
        places = [n for n in segment.module.graph.nodes if n.op == "placeholder"]
        for position, place in enumerate(places):
            place.meta["donated"] = all(
                last[name] == number
                and ":" not in name  # neither a weight nor a user's input
                and name not in kept
                and call.inputs.count(name) == 1
                for number, call in enumerate(calls)
                if isinstance(call, SegmentCall) and call.segment == index
                for name in (call.inputs[position],)
            )


def _levels(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """How many attentions, in graph order, stand before each node."""
    order = {
        node: number
        for number, node in enumerate(n for n in nodes if n.target is ops.paged_attention)
    }
    level: dict[fx.Node, int] = {}
    for node in nodes:
        before = [order[arg] + 1 if arg in order else level[arg] for arg in node.all_input_nodes]
        level[node] = max(before, default=0)
    return level


def _is_cheap(node: fx.Node) -> bool:
    """A size, an arange or the like: costs nothing and holds little."""
    if node.op != "call_function":
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)
    return node.target in (
        torch.ops.aten.arange.default,
        torch.ops.aten.arange.start,
        torch.ops.aten.arange.start_step,
        torch.ops.aten.scalar_tensor.default,
    )


def _name(node: fx.Node) -> str:
    if "weight" in node.meta:
        return f"weight:{node.meta['weight']}"
    if "input" in node.meta:
        return f"input:{node.meta['input']}"
    return node.name


def _attention_call(node: fx.Node, names: dict[fx.Node, str]) -> AttentionCall:
    q, k, v, sinks, layer, scale, window, softcap = node.args
    return AttentionCall(
        layer=layer,  # type: ignore[arg-type]
        scale=scale,  # type: ignore[arg-type]
        window=window,  # type: ignore[arg-type]
        softcap=softcap,  # type: ignore[arg-type]
        q=names[q],  # type: ignore[index]
        k=names[k],  # type: ignore[index]
        v=names[v],  # type: ignore[index]
        sinks=names[sinks] if sinks is not None else None,  # type: ignore[index]
        output=names[node],
    )


def _extract(
    module: fx.GraphModule, own: list[fx.Node], wanted: list[fx.Node], cheap: set[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Copy nodes into a graph of their own; what comes from outside becomes a placeholder."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    # Inputs are collected first: placeholders stand at the top, in order of first use.
    repeated: list[fx.Node] = []
    inside = set(own)

    def need(node: fx.Node) -> None:
        if node in inside or node in repeated or node in inputs:
            return
        if node in cheap:
            for arg in node.all_input_nodes:
                need(arg)
            repeated.append(node)
        else:
            inputs.append(node)

    for node in own:
        for arg in node.all_input_nodes:
            need(arg)
    for node in inputs:
        copies[node] = body.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in [*repeated, *own]:
        copies[node] = body.node_copy(node, lambda arg: copies[arg])
    body.output(tuple(copies[node] for node in wanted))
    body.eliminate_dead_code()
    return fx.GraphModule(module, body), inputs


def _canonical(module: fx.GraphModule) -> str:
    """Equal for segments that differ only in names: nodes numbered in order, shapes written out."""
    number: dict[fx.Node, int] = {}
    lines = []

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value)

    for position, node in enumerate(module.graph.nodes):
        number[node] = position
        value = node.meta.get("val")
        shape = (
            f"{tuple(map(str, value.shape))}{value.dtype}"
            if isinstance(value, torch.Tensor) and node.op == "placeholder"
            else ""
        )
        target = str(node.target) if node.op == "call_function" else ""
        lines.append(json.dumps([node.op, target, plain(node.args), plain(node.kwargs), shape]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
