"""halyard::skinny_linear and linear_add: linears that take our kernels for few rows, the library's otherwise.

Which one is decided when it runs, from shapes alone, so that one compiled graph serves every batch
and a captured step keeps what its number of rows calls for. Needs no Triton until a GPU calls it.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["MAX_ROWS", "Plan", "SkinnyLinears", "arch_of", "choose_plan", "linear_add", "linear_add_",
           "skinny_linear"]  # fmt: skip

MAX_ROWS = 16
_MOST_ADDED = 4  # rows that few_rows_kernel takes
_ADDING_ROWS = 2  # up to here products and sums keep up with the reading of w

_library = torch.library.Library("halyard", "FRAGMENT")
_library.define("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("linear_add(Tensor residual, Tensor x, Tensor weight) -> Tensor")
_library.define("linear_add_(Tensor(a!) residual, Tensor x, Tensor weight) -> ()")


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to launch a linear.

    `form`: "few" (few_rows_kernel, up to 4 rows) or "rows" (rows_kernel, up to 16); splits: programs
    that share the inputs of an output tile, form "rows" only.
    """

    form: Literal["few", "rows"]
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    splits: int = 1

    def __str__(self) -> str:
        words = f"{self.form} {self.block_n}x{self.block_k} w{self.num_warps} s{self.stages}"
        return words if self.splits == 1 else f"{words} /{self.splits}"

    def fits(self, rows: int, outputs: int, inputs: int) -> bool:
        """Whether it makes sense for a shape: enough inputs for each split, rows in reach."""
        if rows > (_MOST_ADDED if self.form == "few" else MAX_ROWS):
            return False
        return self.splits * self.block_k <= inputs and self.block_n <= outputs


def choose_plan(
    rows: int, outputs: int, inputs: int, cores: int, item_size: int = 2, arch: str = "sm_90"
) -> Plan | None:
    """How to multiply rows x inputs by outputs x inputs on a GPU of so many cores.

    None: the library's product is as good or better.
    """
    if not 0 < rows <= MAX_ROWS or inputs < 512:
        return None
    if rows <= _ADDING_ROWS:
        return Plan("few", 2, 2048 // item_size, 4, 1)
    if not arch.startswith("sm_"):
        # 64 KiB of shared memory; RDNA has 256 registers a thread.
        splits = 1
        while -(-outputs // 32) * splits < 3 * cores and splits < 8 and inputs >= 512 * splits:
            splits *= 2
        block_k = (256 if arch.startswith("gfx1") else 512) // item_size
        return Plan("rows", 32, block_k, 4, 2, splits)
    # On an H100, 4 to 16 rows, the linears of 1B and 8B (benchmarks/results/h100_linear.txt).
    tiles = -(-outputs // 64)
    stages = 5 if arch in ("sm_90", "sm_100") else 3  # 99 or 163 KiB of shared memory
    if tiles >= 96 or tiles <= 32:
        return Plan("rows", 64, 256 // item_size, 4, stages, 1 if tiles >= 96 else 4)
    return Plan("rows", 32, 512 // item_size, 4, min(stages, 4)) if tiles >= 64 else None


class SkinnyLinears:
    """Launches on one device's current stream; owns the workspace of splits."""

    def __init__(self) -> None:
        self._kernels: Any = importlib.import_module("halyard.hal.kernels.triton.linear")
        self._partial: Tensor | None = None
        self._tickets: Tensor | None = None
        self._outgrown: list[Tensor] = []  # captured steps still write to them

    def multiply(
        self,
        plan: Plan,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [rows, inputs] @ weight [outputs, inputs]^T -> [rows, outputs] in x's dtype.

        Last dims are contiguous. Sums are fp32 and rounded once.

        Args:
            bias: [outputs]. residual: [rows, outputs], added.
            norm: [inputs], the weight of an RMS norm (with eps) that x goes through first; "few" only.
            gated: x is [rows, 2 x inputs], its first half's silu times its second; "few" only.
            out: written instead of a new tensor; contiguous.
        """
        (outputs, inputs), rows = weight.shape, x.shape[0]
        if x.shape[1] != inputs * (2 if gated else 1):
            raise AssertionError(f"{x.shape[1]} inputs for a weight of {inputs}")
        if plan.form == "rows" and (norm is not None or gated):
            raise AssertionError("the matrix units' form takes its inputs as they are")
        y = x.new_empty((rows, outputs)) if out is None else out
        if not rows:
            return y
        tiles = -(-outputs // plan.block_n)
        more = {
            "BIAS": bias is not None,
            "RESIDUAL": residual is not None,
            "BLOCK_N": plan.block_n,
            "BLOCK_K": plan.block_k,
            "num_warps": plan.num_warps,
        }
        bias = y if bias is None else bias
        residual = y if residual is None else residual
        if plan.form == "few":
            self._kernels.few_rows_kernel[(tiles,)](
                x, weight, y, bias, residual, y if norm is None else norm, outputs, inputs,
                x.stride(0), weight.stride(0), residual.stride(0), eps,
                ROWS=rows, EVEN=inputs % plan.block_k == 0, STAGES=plan.stages,
                NORM=norm is not None, GATED=gated, **more,
            )  # fmt: skip
            return y
        steps = -(-inputs // plan.block_k)
        partial, tickets = y, y
        if plan.splits > 1:
            size = tiles * plan.splits * plan.block_n * MAX_ROWS
            partial, tickets = self._take_workspace(size, tiles, x.device)
        self._kernels.rows_kernel[(tiles, plan.splits)](
            x, weight, y, bias, residual, partial, tickets, rows, outputs, inputs,
            x.stride(0), weight.stride(0), residual.stride(0),
            -(-steps // plan.splits) * plan.block_k,
            ROWS=MAX_ROWS, SPLITS=plan.splits, EVEN=inputs % plan.block_k == 0,
            num_stages=plan.stages, **more,
        )  # fmt: skip
        return y

    def _take_workspace(self, size: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """fp32 parts [size] and int32 tickets [tiles], which every launch leaves at zero."""
        if self._partial is None or self._partial.numel() < size:
            if self._partial is not None:
                self._outgrown.append(self._partial)
            self._partial = torch.empty(size, dtype=torch.float32, device=device)
        if self._tickets is None or self._tickets.numel() < tiles:
            if self._tickets is not None:
                self._outgrown.append(self._tickets)
            self._tickets = torch.zeros(tiles, dtype=torch.int32, device=device)
        return self._partial, self._tickets


@cache
def arch_of(device: torch.device) -> str:
    """As DeviceInfo.arch, of a GPU of torch."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


@cache
def _on(device: torch.device) -> tuple[SkinnyLinears, int, str]:
    """A device's launcher, number of cores and architecture."""
    properties: Any = torch.cuda.get_device_properties(device)
    return SkinnyLinears(), properties.multi_processor_count, arch_of(device)


@torch.library.impl(_library, "skinny_linear", "CPU")
def _skinny_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


@torch.library.impl(_library, "skinny_linear", "CUDA")
def _skinny_linear_gpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _by_few_rows(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias) if y is None else y.view(*x.shape[:-1], -1)


def _by_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """[rows, outputs] by our kernels; None: the library's are as good."""
    inputs, rows = x.shape[-1], math.prod(x.shape[:-1])
    if rows > MAX_ROWS or x.dtype != weight.dtype or weight.stride(1) != 1:
        return None
    linears, cores, arch = _on(x.device)
    plan = choose_plan(rows, weight.shape[0], inputs, cores, x.element_size(), arch)
    if plan is None:
        return None
    flat = x.reshape(rows, inputs).contiguous()
    return linears.multiply(plan, flat, weight, bias, residual=residual, out=out)


@torch.library.register_fake("halyard::skinny_linear", lib=_library)
def _skinny_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


skinny_linear = torch.ops.halyard.skinny_linear.default
"""x [..., in], weight [out, in], bias [out] or None -> [..., out] in x's dtype."""


@torch.library.impl(_library, "linear_add", "CPU")
@torch.library.impl(_library, "linear_add", "CUDA")
def _linear_add(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.halyard.skinny_linear(x, weight, None)
    return residual + product


@torch.library.impl(_library, "linear_add_", "CPU")
def _linear_add_in_place_cpu(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    residual += torch.nn.functional.linear(x, weight)


@torch.library.impl(_library, "linear_add_", "CUDA")
def _linear_add_in_place_gpu(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    flat = residual.view(-1, weight.shape[0])
    if _by_few_rows(x, weight, residual=flat, out=flat) is None:
        flat.addmm_(x.reshape(-1, x.shape[-1]), weight.T)


@torch.library.register_fake("halyard::linear_add", lib=_library)
def _linear_add_fake(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(residual)


@torch.library.register_fake("halyard::linear_add_", lib=_library)
def _linear_add_in_place_fake(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    return None


linear_add = torch.ops.halyard.linear_add.default
"""residual [..., out] + x [..., in] @ weight [out, in]^T, all of one dtype; a new tensor."""

linear_add_ = torch.ops.halyard.linear_add_.default
"""As `linear_add`, to the contiguous `residual` itself: the sum is rounded once."""
