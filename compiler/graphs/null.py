"""Computes nothing: zeros of the right shapes. With the null kernels it drives scheduler and API tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from halyard.hal.contract import CONTRACT_VERSION, Executable
from halyard.hal.types import DeviceInfo, Probe

__all__ = ["NullCompiler"]


class NullCompiler:
    """A backend with this compiler loads no weights; its program is compiler.null_program's."""

    contract_version = CONTRACT_VERSION
    name = "null"

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        return Probe(True)

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        return ()

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        outputs = segment.graph.output_node().args[0]
        shapes = [node.meta["val"].shape for node in outputs]  # type: ignore[union-attr]

        def run(*_: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.zeros([int(size) for size in shape]) for shape in shapes)

        return run

    def save(self, executable: Executable, directory: Path) -> bool:
        return False

    def load(self, directory: Path, device: DeviceInfo) -> Executable:
        raise FileNotFoundError("null segments are not kept")
