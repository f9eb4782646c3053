"""Devices that record by running again, and engines on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halyard import LLM
from halyard.compiler.captured import CapturedProgram
from halyard.hal.kernels.native.library import find_compiler

__all__ = ["BACKEND", "InPlace", "Recorder", "RecordingDevice", "SharingRecorder", "record"]

BACKEND = "reference" if find_compiler() is None else "cpu-eager"


class Recorder:
    """A device whose replay runs the step again."""

    torch_device = torch.device("cpu")

    def __init__(self, able: bool = True) -> None:
        self.able = able
        self.replayed = 0
        self.recorded = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None] | None:
        if not self.able:
            return None
        self.recorded += 1
        step()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


class SharingRecorder(Recorder):
    """And whose recordings work where others have left what they computed."""

    def __init__(self) -> None:
        super().__init__()
        self._left: list[Tensor] = []

    def capture(self, step: Callable[[], None]) -> Callable[[], None] | None:
        replay = super().capture(step)
        assert replay is not None

        def replay_elsewhere() -> None:
            for tensor in self._left:
                tensor.fill_(float("nan"))
            replay()

        return replay_elsewhere

    def unheld(self, tensor: Tensor) -> Tensor:
        self._left.append(tensor)
        return tensor


class RecordingDevice(Recorder):
    """A recorder that can be an executor's device."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class InPlace:
    """A program whose logits lie where they lay before, as a recording's do."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._logits: dict[tuple[int, ...], Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, *inputs: Any) -> Tensor:
        logits = self._inner.run(*inputs)
        kept = self._logits.setdefault(tuple(logits.shape), torch.empty_like(logits))
        return kept.copy_(logits)


def record(
    llm: LLM, rows: int, blocks: int, *most_tokens: int
) -> tuple[RecordingDevice, CapturedProgram]:
    """From here on the engine's steps are recorded, if its batcher asks for it: its device and program."""
    executor = llm.engine.executor
    device = RecordingDevice(executor.device)
    program: Any = InPlace(executor.program)
    captured = CapturedProgram(program, device, rows, blocks, 16, *most_tokens)  # type: ignore[arg-type]
    captured.set_pool(executor.pool)
    executor.program, executor.device = captured, device  # type: ignore[assignment]
    return device, captured
