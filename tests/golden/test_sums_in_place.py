"""Products that add in place and take gates in, and rotations at once, as GPUs run them, change no logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from test_program_matches_hf import Batch, check
from tiny_models import SERVED, tiny_model
from tiny_programs import build_tiny
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from halyard.compiler.graphs.eager import EagerCompiler
from halyard.compiler.graphs.inductor_gpu import add_in_place, compile_artefact
from halyard.compiler.program import Program, UnboundProgram
from halyard.hal.contract import Executable
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.experts import expert_parts, experts
from halyard.hal.kernels.native.library import find_compiler
from halyard.hal.kernels.reference.kernels import ReferenceKernels
from halyard.hal.kernels.triton.gated import gated_product
from halyard.hal.kernels.triton.largest import largest
from halyard.hal.kernels.triton.rotary import rotate_pair
from halyard.hal.kernels.triton.skinny import linear_add, linear_add_
from halyard.hal.types import DeviceInfo
from halyard.models.spec import ModelSpec

DEVICE = CpuDevice()
PASSES = (
    "skinny_linears",
    "add_in_linears",
    "gate_linears",
    "rotate_heads",
    "largest_of_few",
    "experts_apart",
)
# Qwen 3 and Gemma 3 norm their heads first, gpt-oss and DeepSeek turn them by another form.
ROTATED = frozenset({"llama", "llama-tied", "qwen2", "mistral", "gemma2", "phi3", "mixtral",
                     "qwen2-mixed-windows", "rope-linear", "rope-llama3"})  # fmt: skip


class InPlace(EagerCompiler):
    """The segments that Inductor gets on a GPU, run node by node."""

    def __init__(self, *without: str) -> None:
        self.changed: list[fx.GraphModule] = []
        self.without = without

    @property
    def targets(self) -> list[object]:
        return [node.target for module in self.changed for node in module.graph.nodes]

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        own = tuple(name for name in PASSES if name not in self.without)
        return ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input", *own)

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        before = segment.code
        self.changed.append(add_in_place(segment))
        assert segment.code == before
        return super().compile(self.changed[-1], inputs, device)


@cache
def as_on_gpus(family: str) -> tuple[InPlace, UnboundProgram]:
    """A tiny model's program, made once, and what its compiler was given."""
    compiler = InPlace()
    return compiler, build_tiny(family, compiler)


def bound(family: str, unbound: UnboundProgram) -> Program:
    """With the tiny model's weights and a pool."""
    model, kernels = tiny_model(family), ReferenceKernels(DEVICE)
    program = unbound.bind(
        {name: model.state_dict()[name].clone() for name in unbound.weights}, kernels
    )
    layout = kernels.layout(ModelSpec.from_hf(model.config).kv_spec("float32", 4))
    program.set_pool(DEVICE.allocate_kv(layout, 64, host=False))
    return program


@pytest.mark.parametrize("family", SERVED)
def test_few_wanted_tokens_go_on_alone_on_gpus_too(family: str) -> None:
    """Their operators are known to go row by row; one family's routing regroups tokens."""
    compiler, program = as_on_gpus(family)
    assert (program.token_axes is None) == (family == "deepseek-v3")
    # The first segment and what all layers behind it share.
    assert compiler.targets.count(rotate_pair) == (2 if family in ROTATED else 0)
    if family in ROTATED:
        assert not {torch.ops.aten.neg.default, torch.ops.aten.pad.default} & set(compiler.targets)


# gemma2 norms what it adds: its products can't. mixtral's experts are no linears.
@pytest.mark.parametrize(
    ("family", "in_place", "gated"),
    [("llama", 4, 2), ("qwen2", 4, 2), ("phi3", 4, 2), ("gemma2", 0, 2), ("mixtral", 2, 0)],
)
def test_logits_stay(family: str, in_place: int, gated: int) -> None:
    compiler, unbound = as_on_gpus(family)
    targets = compiler.targets
    assert targets.count(linear_add_) == in_place
    assert targets.count(linear_add) == 0
    assert targets.count(gated_product) == gated
    program = bound(family, unbound)
    check(family, program)
    # Of a prompt the last token alone goes on behind the last attention, on GPUs too.
    assert program._token_axes is not None
    sequence = [5 * i % 128 for i in range(20)]
    everything = Batch([sequence]).step(program, {0: 20})[0]
    last = Batch([sequence]).step(program, {0: 20}, wanted=[19])[0]
    torch.testing.assert_close(last, everything[[19]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "chosen"), [("mixtral", 2), ("qwen3-moe", 2), ("gpt-oss", 2), ("deepseek-v3", 3)]
)
def test_experts_are_chosen_and_added_up_by_ours(family: str, chosen: int) -> None:
    """In each segment that has experts; deepseek's groups are chosen by sums of their best two."""
    compiler, unbound = as_on_gpus(family)
    assert torch.ops.aten.topk.default not in compiler.targets
    assert compiler.targets.count(largest) >= chosen
    assert compiler.targets.count(expert_parts) >= 2
    assert experts not in compiler.targets
    check(family, bound(family, unbound))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "phi3", "mixtral"])
def test_rotations_at_once_give_the_same_logits(family: str) -> None:
    plain = InPlace("rotate_heads")
    unturned = build_tiny(family, plain)
    prompts = [[(7 * i + row) % 128 for i in range(13 + row)] for row in range(2)]
    logits = []
    for (compiler, unbound), times in ((as_on_gpus(family), 2), ((plain, unturned), 0)):
        program = bound(family, unbound)
        assert compiler.targets.count(rotate_pair) == times
        batch = Batch(prompts)
        steps: list[dict[int, int]] = [{0: 12, 1: 8}, {0: 1, 1: 6}]
        logits.append([row for counts in steps for row in batch.step(program, counts).values()])
    for with_it, without in zip(*logits, strict=True):
        torch.testing.assert_close(with_it, without, atol=1e-6, rtol=1e-6)


class Strides(TorchDispatchMode):
    """What the rotations that run are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is rotate_pair:
            self.seen.append([arg.stride() for arg in args])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")
def test_inductor_rotates_parts_of_a_product_where_they_lie() -> None:
    """No copy before the operator: heads are as far apart as in the product of q, k and v."""
    compiler, _ = as_on_gpus("llama")
    values = [n.meta["val"] for n in compiler.changed[1].graph.nodes if n.op == "placeholder"]
    compiled = compile_artefact(compiler.changed[1], values)
    inputs = [
        torch.zeros([5 if isinstance(size, torch.SymInt) else size for size in value.shape], dtype=value.dtype)
        for value in values
    ]  # fmt: skip
    with Strides() as strides:
        outputs = compiled(*inputs)
    assert strides.seen == [[(128, 16, 1), (128, 16, 1), (16, 1), (16, 1)]]
    assert {(64, 16, 1), (32, 16, 1)} <= {output.stride() for output in outputs}


def made(donated: bool, late_reader: bool, view_before: bool = False) -> fx.GraphModule:
    """residual + linear; the residual may be read behind it, or through a view made before it."""
    graph = fx.Graph()
    value = torch.randn(3, 8)
    places = [graph.placeholder(name) for name in ("residual", "x", "weight")]
    for place, meta in zip(places, (value, value, torch.randn(8, 8)), strict=True):
        place.meta["val"] = meta
    places[0].meta["donated"] = donated
    view = (
        graph.call_function(torch.ops.aten.view.default, (places[0], [24])) if view_before else None
    )
    total = graph.call_function(linear_add, tuple(places))
    total.meta["val"] = value
    out: list[fx.Node] = [total]
    if late_reader:
        out.append(graph.call_function(torch.ops.aten.neg.default, (places[0],)))
    if view is not None:
        out.append(graph.call_function(torch.ops.aten.neg.default, (view,)))
    graph.output(tuple(out))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (made(donated=True, late_reader=False), True),
        (made(donated=False, late_reader=False), False),
        (made(donated=True, late_reader=True), False),
        (made(donated=True, late_reader=False, view_before=True), False),
    ],
    ids=["given", "kept by others", "read later", "seen through a view"],
)
def test_only_what_nobody_reads_any_more_is_written_to(
    module: fx.GraphModule, changes: bool
) -> None:
    changed = add_in_place(module)
    assert (linear_add_ in {node.target for node in changed.graph.nodes}) == changes
    residual, x, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8, 8)
    expected, before = module(residual, x, weight), residual.clone()
    torch.testing.assert_close(changed(residual, x, weight), expected)
    assert torch.equal(residual, before) == (not changes)
