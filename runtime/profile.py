"""Where a step's time goes, on the host and on the device.

The host's time is taken by wrapping the parts of an engine; each moment belongs to the innermost
one. The device's comes from torch's profiler, by the names of kernels. On a device without kernels
of its own (a CPU) the host's time is all there is; the profiler and the native library's own clock
tell matrix products from the rest between two attentions.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from halyard.hal.kernels.native.library import product_seconds

if TYPE_CHECKING:
    from halyard.runtime.engine import Engine

__all__ = ["HOST_PARTS", "StepProfile", "profiled"]

HOST_PARTS = ("plan", "prepare", "copies", "attention", "GEMMs", "norms and the rest", "sampling",
              "wait", "commit", "other")  # fmt: skip
# What a kernel (or, on a CPU, an operator) does, by its name; the first that fits counts.
_KINDS: tuple[tuple[str, str], ...] = (
    ("copies", r"memcpy|memset|move_blocks|kv_write"),
    ("attention", r"paged_|merge_kernel|attention|flash|fmha"),
    ("sampling", r"draw_\w*kernel|argmax|argmin|reduce_kernel|topk|sort|scan|searchsorted|softmax"),
    (
        "GEMMs",
        r"gemm|nvjet|cutlass|xmma|cublas|splitk|linear|::mm\b|::addmm\b|::bmm\b|matmul|^(few_)?rows_kernel",
    ),
)


def _kind(name: str) -> str:
    lower = name.lower()
    if lower.startswith(("triton_poi_", "triton_red_", "triton_per_")):
        return "norms and the rest"  # Inductor names its kernels after what is around them too
    return next((kind for kind, words in _KINDS if re.search(words, lower)), "norms and the rest")


@dataclass(slots=True)
class StepProfile:
    """Seconds by part, of all steps together."""

    steps: int = 0
    seconds: float = 0.0  # on the wall
    host: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)  # empty: the host's time is all
    kernels: list[tuple[str, float, int]] = field(default_factory=list)  # name, seconds, calls

    @property
    def idle(self) -> float:
        """Seconds in which the device had no kernel to run."""
        return max(0.0, self.seconds - sum(self.device.values())) if self.device else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Milliseconds a step, as plain data."""
        scale = 1e3 / max(1, self.steps)
        found: dict[str, Any] = {
            "steps": self.steps,
            "milliseconds": self.seconds * scale,
            "host": {name: seconds * scale for name, seconds in self.host.items()},
        }
        if self.device:
            found["device"] = {n: s * scale for n, s in self.device.items()} | {
                "idle": self.idle * scale
            }
        return found

    def table(self) -> str:
        """One line a part: milliseconds a step and the share of the whole."""
        rows = self.to_dict()
        lines = [f"{self.steps} steps, {rows['milliseconds']:.3f} ms each"]
        for where in ("host", "device"):
            for name, ms in rows.get(where, {}).items():
                share = ms / rows["milliseconds"] if rows["milliseconds"] else 0.0
                lines.append(f"  {where:<7}{name:<20}{ms:>9.3f} ms {share:>7.1%}")
        return "\n".join(lines)


class _Clock:
    """Gives every moment to the innermost part under way."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(HOST_PARTS, 0.0)
        self._under_way = ["other"]
        self._since = time.perf_counter()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._lap()
            self._under_way.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self._lap()
                self._under_way.pop()

        return timed

    def _lap(self) -> None:
        now = time.perf_counter()
        self.totals[self._under_way[-1]] += now - self._since
        self._since = now


@contextmanager
def profiled(engine: Engine, host_only: bool = False) -> Iterator[StepProfile]:
    """Profile the steps that run inside; the profile is filled in at the end.

    Steps are slower meanwhile, and more so the shorter they are: shares count, not rates. With
    `host_only` there is no torch profiler, and the host's times are nearly those without any.
    """
    executor, scheduler = engine.executor, engine.scheduler
    on_gpu = executor.device.torch_device.type == "cuda"
    clock = _Clock()
    wrapped: list[tuple[Any, str, Any]] = []

    def wrap(owner: Any, name: str, part: str) -> None:
        own = vars(owner).get(name) if hasattr(owner, "__dict__") else None
        wrapped.append((owner, name, own))
        setattr(owner, name, clock.wrap(part, getattr(owner, name)))

    wrap(scheduler, "schedule", "plan")
    wrap(scheduler, "schedule_ahead", "plan")
    wrap(scheduler, "commit", "commit")
    wrap(executor, "prepare", "prepare")
    wrap(executor, "issue", "copies")
    for name in ("run", "run_with_hidden"):
        wrap(executor.program, name, "norms and the rest")
    wrap(executor.kernels, "attend", "attention")
    wrap(executor.sampler, "draw", "sampling")
    profile = StepProfile()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    before, in_products = engine.stats(), product_seconds()
    executor.device.synchronize()
    began = time.perf_counter()
    try:
        recorder = nullcontext() if host_only else torch.profiler.profile(activities=activities)
        with recorder as trace:
            clock._lap()
            clock.totals = dict.fromkeys(HOST_PARTS, 0.0)
            began = time.perf_counter()
            yield profile
            executor.device.synchronize()
            clock._lap()
            profile.seconds = time.perf_counter() - began
    finally:
        for owner, name, own in reversed(wrapped):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
    after = engine.stats()
    profile.steps = after.steps - before.steps
    # Nothing of ours runs while the engine waits: its own clock knows, and ours counted it as other.
    waited = after.phase_seconds.get("wait", 0.0) - before.phase_seconds.get("wait", 0.0)
    clock.totals["wait"] = min(waited, clock.totals["other"])
    clock.totals["other"] -= clock.totals["wait"]
    profile.host = {name: seconds for name, seconds in clock.totals.items() if seconds}
    in_products = product_seconds() - in_products
    if trace is None:
        _part_products(profile, in_products)
        return
    for event in trace.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6
        if seconds <= 0 or (on_gpu and event.device_type == torch._C._autograd.DeviceType.CPU):
            continue
        profile.kernels.append((event.key, seconds, event.count))
        if on_gpu:
            kind = _kind(event.key)
            profile.device[kind] = profile.device.get(kind, 0.0) + seconds
    profile.kernels.sort(key=lambda kernel: -kernel[1])
    if not on_gpu:
        products = sum(s for name, s, _ in profile.kernels if _kind(name) == "GEMMs")
        _part_products(profile, max(products, in_products))


def _part_products(profile: StepProfile, seconds: float) -> None:
    """Products run within what was counted as the rest of the program."""
    rest = profile.host.get("norms and the rest", 0.0)
    profile.host["GEMMs"] = min(seconds, rest)
    profile.host["norms and the rest"] = rest - profile.host["GEMMs"]
    profile.host = {n: profile.host[n] for n in HOST_PARTS if profile.host.get(n)}
