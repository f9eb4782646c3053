"""L1 of the conformance suite: graph compilers on the pieces that models are made of.

Each piece is a small module, exported with a dynamic number of tokens as the real trace does it,
compiled by the backend's graph compiler and compared with itself in fp64 at sizes it has not seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from halyard.compiler.trace import retarget
from halyard.hal.conformance.backend import BackendUnderTest
from halyard.hal.conformance.case import Case, CaseContext
from halyard.hal.conformance.tolerances import limit_for
from halyard.hal.contract import Executable
from halyard.hal.dtypes import torch_dtype
from halyard.hal.types import DType

__all__ = ["cases"]

SIZES = (1, 2, 3, 16, 17, 97)
HIDDEN, WIDE, VOCAB, HEADS, KV_HEADS, DIM = 48, 80, 128, 4, 2, 16
Piece = Callable[..., tuple[Tensor, ...]]
Shape = str | tuple[int, ...]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    full = x.float()
    full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * full.to(x.dtype)


def _swiglu(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    y = _norm(x, norm)
    return (x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down),)


def _geglu(x: Tensor, gate: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    inner = F.gelu(F.linear(x, gate, bias), approximate="tanh") * F.linear(x, up)
    return (F.linear(inner, down),)


def _rotary_qkv(
    x: Tensor, positions: Tensor, frequencies: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    angles = positions[:, None].to(frequencies.dtype) * frequencies[None, :]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def turn(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat([-second, first], dim=-1) * sin

    tokens = x.shape[0]
    return (
        turn(F.linear(x, q).view(tokens, HEADS, DIM)),
        turn(F.linear(x, k).view(tokens, KV_HEADS, DIM)),
        F.linear(x, v).view(tokens, KV_HEADS, DIM),
    )


def _embedding(ids: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return (F.embedding(ids, table) * HIDDEN**0.5,)


def _head(x: Tensor, rows: Tensor, norm: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    logits = F.linear(_norm(x[rows], norm), table)
    return (30.0 * torch.tanh(logits / 30.0),)


# name -> (piece, shapes of its inputs; "tokens", "ids", "positions" and "rows" have dynamic sizes)
PIECES: dict[str, tuple[Piece, tuple[Shape, ...]]] = {
    "norm_swiglu_residual": (
        _swiglu, ("tokens", (HIDDEN,), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE))),
    "bias_geglu": (_geglu, ("tokens", (WIDE, HIDDEN), (WIDE,), (WIDE, HIDDEN), (HIDDEN, WIDE))),
    "rotary_qkv": (
        _rotary_qkv, ("tokens", "positions", "frequencies", (HEADS * DIM, HIDDEN),
                      (KV_HEADS * DIM, HIDDEN), (KV_HEADS * DIM, HIDDEN))),
    "embedding": (_embedding, ("ids", (VOCAB, HIDDEN))),
    "logits_of_some_rows": (_head, ("tokens", "rows", (HIDDEN,), (VOCAB, HIDDEN))),
}  # fmt: skip


def cases(backend: BackendUnderTest) -> list[Case]:
    """Every piece for every dtype of the backend; the null compiler computes nothing."""
    if not backend.computes:
        return []
    found = []
    for dtype in ("float32", "bfloat16", "float16"):
        waived = () if dtype in backend.claimed_dtypes() else (f"dtype {dtype}",)
        for name in PIECES:
            found.append(Case("L1", name, _piece, dtype, params={"piece": name}, seconds=300.0,
                              waived=waived))  # fmt: skip
    return found


def _inputs(shapes: tuple[Shape, ...], size: int, dtype: torch.dtype) -> list[Tensor]:
    """Random inputs on the host for `size` tokens."""
    generator = torch.Generator().manual_seed(size)
    made = []
    for shape in shapes:
        if shape == "tokens":
            made.append(torch.randn(size, HIDDEN, generator=generator).to(dtype))
        elif shape == "ids":
            made.append(torch.randint(VOCAB, (size,), generator=generator))
        elif shape == "positions":
            made.append(torch.randint(200, (size,), generator=generator))
        elif shape == "rows":
            made.append(torch.randint(size, (max(1, size // 2),), generator=generator))
        elif shape == "frequencies":  # fp32, as rotary tables are
            made.append(10000.0 ** (-torch.arange(DIM // 2) / (DIM // 2)))
        elif isinstance(shape, tuple):
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
            made.append((torch.randn(shape, generator=generator) * scale).to(dtype))
    return made


def _export(
    name: str, dtype: torch.dtype, device: torch.device
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The piece as a segment: placeholders for all inputs, a tuple out, symbolic token counts."""
    piece, shapes = PIECES[name]

    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return piece(*inputs)

    tokens = torch.export.Dim("ntok", min=1, max=1 << 20)
    rows = torch.export.Dim("nrow", min=1, max=1 << 20)
    dynamic = tuple(
        {0: rows} if shape == "rows" else {0: tokens} if isinstance(shape, str)
        and shape != "frequencies" else None
        for shape in shapes
    )  # fmt: skip
    example = tuple(tensor.to("meta") for tensor in _inputs(shapes, 7, dtype))
    with torch.no_grad():
        exported = torch.export.export(Module(), example, dynamic_shapes=(dynamic,), strict=False)
    module = exported.graph_module
    retarget(module, device)
    return module, [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]


def _compile(context: CaseContext) -> Executable:
    name, device = context.case.params["piece"], context.device
    module, inputs = _export(name, torch_dtype(context.dtype), device.torch_device)
    return context.compiler.compile(module, inputs, device.info)


def _piece(context: CaseContext) -> None:
    run = _compile(context)
    for size in SIZES:
        _compare(context, run, size)
    with tempfile.TemporaryDirectory() as folder:
        kept = context.compiler.save(run, Path(folder) / "segment")
        context.notes["kept_on_disk"] = kept
        if kept:
            loaded = context.compiler.load(Path(folder) / "segment", context.device.info)
            for size in (1, 17):
                _compare(context, loaded, size)


def _compare(context: CaseContext, run: Executable, size: int) -> None:
    piece, shapes = PIECES[context.case.params["piece"]]
    inputs = _inputs(shapes, size, torch_dtype(context.dtype))
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    truth, plain = piece(*wide), piece(*inputs)
    with torch.inference_mode():
        found = run(*[tensor.to(context.device.torch_device) for tensor in inputs])
    context.require(len(found) == len(truth), f"{len(found)} outputs instead of {len(truth)}")
    for number, (got, exact, own) in enumerate(zip(found, truth, plain, strict=True)):
        context.require(tuple(got.shape) == tuple(exact.shape), f"shape {list(got.shape)}")
        context.require(got.dtype == own.dtype, f"output {number} is {got.dtype}, not {own.dtype}")
        limit = limit_for(
            context.dtype,
            (own.double() - exact).abs().max().item(),
            exact.abs().max().item(),
            _condition(context.dtype),
            context.backend.name,
            context.case.name,
        )
        error = (got.cpu().double() - exact).abs().max().item()
        context.check(error, limit, f"output {number} at {size} tokens")


def _condition(dtype: DType) -> float:
    """Sums over `WIDE` products of magnitude about one, in fp32; lower dtypes round more anyway."""
    return float(WIDE) if dtype == "float32" else 0.0
