"""No compiler: the graph runs node by node. Works everywhere, and is what others are checked by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, fx

from halyard.hal.contract import CONTRACT_VERSION, Executable
from halyard.hal.types import DeviceInfo, Probe

__all__ = ["EagerCompiler"]


class EagerCompiler:
    """Runs the segment's own generated Python."""

    contract_version = CONTRACT_VERSION
    name = "eager"

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        return Probe(True)

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        return ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input")

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        return segment.forward

    def save(self, executable: Executable, directory: Path) -> bool:
        return False

    def load(self, directory: Path, device: DeviceInfo) -> Executable:
        raise FileNotFoundError("eager segments are not kept")
