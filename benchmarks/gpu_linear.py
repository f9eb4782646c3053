"""Linears of few rows on a GPU: Triton's forms against torch's, after checking the results.

Usage: python benchmarks/gpu_linear.py [--rows 1 2 4 8 16] [--only 1b] [--dtype bfloat16]
                                       [--budget SECONDS] [--all] [--no-draw] [--out FILE]

Each cell is one linear of a model; TB/s counts its weight read once. A captured graph runs through
copies of the weight that together are many times the second-level cache; a figure is the median of
its replays over its calls. Results are held against fp64 first, outputs poisoned with NaN before.
`step` adds up the linears of a whole decode step. Figures also go to FILE, one JSON object a line.
A configuration that fails is told and left out; one that breaks the device's context starts the rest
in a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from halyard.hal.dtypes import torch_dtype
from halyard.hal.kernels.triton.skinny import Plan, SkinnyLinears, choose_plan

COLD_BYTES = 320 << 20  # a cell cycles through this much
WIDEST = 4096 * 28672  # elements of the largest weight that is copied
LEAST_CALLS = 16  # in a graph, for weights that aren't larger than the cache many times over
VOCAB = 128256
LAYERS = {"1b": 16, "8b": 32}
LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-5}
Call = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """A linear of a model; it runs `times` in a step."""

    model: str
    name: str
    inputs: int
    outputs: int

    @property
    def times(self) -> int:
        return 1 if self.name == "lm_head" else LAYERS[self.model]


CELLS = [
    Cell("1b", "qkv", 2048, 3072),
    Cell("1b", "o", 2048, 2048),
    Cell("1b", "gate_up", 2048, 16384),
    Cell("1b", "down", 8192, 2048),
    Cell("1b", "lm_head", 2048, VOCAB),
    Cell("8b", "qkv", 4096, 6144),
    Cell("8b", "o", 4096, 4096),
    Cell("8b", "gate_up", 4096, 28672),
    Cell("8b", "down", 14336, 4096),
    Cell("8b", "lm_head", 4096, VOCAB),
]
PLANS = [
    Plan("few", 2, 1024, 4, 1),
    Plan("few", 4, 1024, 4, 1),
    Plan("few", 8, 1024, 4, 1),
    Plan("few", 2, 2048, 4, 1),
    Plan("few", 4, 2048, 8, 1),
    Plan("few", 4, 512, 2, 1),
    Plan("few", 8, 1024, 4, 4),
    Plan("few", 16, 512, 4, 4),
    Plan("rows", 16, 256, 4, 4, 4),
    Plan("rows", 16, 512, 4, 3, 2),
    Plan("rows", 32, 256, 4, 4),
    Plan("rows", 32, 256, 4, 4, 4),
    Plan("rows", 32, 256, 4, 4, 8),
    Plan("rows", 64, 128, 4, 5),
    Plan("rows", 64, 128, 4, 5, 4),
    Plan("rows", 64, 128, 4, 5, 8),
]


class Bench:
    """One device, and one pool of random numbers that all weights are views of."""

    def __init__(self, options: argparse.Namespace) -> None:
        from halyard.hal.devices.cuda import CudaDevice
        from halyard.hal.devices.rocm import RocmDevice

        self.options = options
        self.device: Any = (RocmDevice if torch.version.hip else CudaDevice)()
        self.dtype = torch_dtype(options.dtype)
        self.where = self.device.torch_device
        self.linears = SkinnyLinears()
        most = max([cell.inputs * cell.outputs for cell in self.cells()], default=0)
        size = max(most, COLD_BYTES // self.dtype.itemsize + WIDEST)
        torch.manual_seed(0)
        self.pool = torch.empty(size, dtype=self.dtype, device=self.where).normal_(std=0.02)
        self.inputs = torch.randn(16, 2 * 14336).to(self.dtype).to(self.where)
        self.started = time.perf_counter()
        self.lines: list[dict[str, Any]] = []

    def cells(self) -> list[Cell]:
        return [c for c in CELLS if self.options.only in f"{c.model} {c.name}"]

    def left(self) -> float:
        return float(self.options.budget - (time.perf_counter() - self.started))

    def seconds(self, calls: list[Call], least: int = LEAST_CALLS) -> float:
        """Device time of one call: the median of replays of one captured graph of all calls."""
        rounds = -(-least // len(calls))

        def every() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        replay = self.device.capture(every)
        if replay is None:
            raise RuntimeError("can't be captured")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for number in range(9):
            begin.record()
            replay()
            end.record()
            end.synchronize()
            if number >= 2:
                times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times) / (rounds * len(calls))

    def weights(self, cell: Cell) -> list[Tensor]:
        """Copies of a cell's weight, at least two and more than the cache holds."""
        size = cell.inputs * cell.outputs
        count = max(
            1, min(self.pool.numel() // size, 64, -(-COLD_BYTES // (size * self.dtype.itemsize)))
        )
        return [
            self.pool[n * size : (n + 1) * size].view(cell.outputs, cell.inputs)
            for n in range(count)
        ]

    def truth(self, cell: Cell, weight: Tensor) -> Tensor:
        """[16, outputs] in fp64."""
        x = self.inputs[:, : cell.inputs].double()
        return torch.cat([x @ part.double().T for part in weight.split(16384)], dim=1)

    def tell(self, **values: Any) -> None:
        self.lines.append(values)
        if self.options.out:
            with open(self.options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def guarded(self, key: str, work: Callable[[], float]) -> float | None:
        """What `work` returns, or None if it fails or did in the process before this one."""
        if key in self.options.skip:
            return None
        try:
            return work()
        except Exception as problem:  # noqa: BLE001 - one configuration must not end the others
            print(f"    {key}: FAILED: {' '.join(str(problem).split())[:150]}", flush=True)
            self.tell(failed=key, error=str(problem)[:500])
            try:
                torch.cuda.synchronize()
            except Exception:  # noqa: BLE001 - the context is lost: the rest in a new process
                self.start_again(key)
            return None

    def start_again(self, key: str) -> None:
        left = max(0.0, self.left())
        print(f"    the device's context is lost: the rest in a new process, {left:.0f} s left")
        sys.stdout.flush()
        done = [f"{line['model']} {line['linear']} {line['rows']}" for line in self.lines
                if "model" in line]  # fmt: skip
        arguments = [*sys.argv, "--budget", str(left), "--skip", *self.options.skip, key]
        os.execv(sys.executable, [sys.executable, *arguments, "--done", *self.options.done, *done])

    def run(self, cell: Cell, rows: int) -> None:
        weights = self.weights(cell)
        x = self.inputs[:rows, : cell.inputs].contiguous()
        out = torch.empty(rows, cell.outputs, dtype=self.dtype, device=self.where)
        large = len(weights) * weights[0].nbytes >= 2 * COLD_BYTES
        least = 3 if large else LEAST_CALLS
        truth = self.truth(cell, weights[0])[:rows]
        name = f"{cell.model} {cell.name} {rows}"

        def checked(call: Callable[[Tensor], object]) -> float:
            for _ in range(2):  # the second time with what the first left in the workspace
                out.fill_(float("nan"))
                call(weights[0])
                error = ((out.double() - truth).abs().max() / truth.abs().max()).item()
                if not error <= LIMITS[self.options.dtype]:
                    raise RuntimeError(f"WRONG: error {error:.2e}")
            took = self.seconds([lambda w=w: call(w) for w in weights], least)
            errors.append(error)
            return took

        errors: list[float] = []
        base = self.guarded(
            f"{name} library",
            lambda: self.seconds([lambda w=w: linear(x, w) for w in weights], least),
        )
        vector = None
        if rows == 1:
            vector = self.guarded(
                f"{name} mv",
                lambda: self.seconds([lambda w=w: torch.mv(w, x[0]) for w in weights], least),
            )
        chosen = choose_plan(rows, cell.outputs, cell.inputs, self.device.info.num_cores)
        plans = [plan for plan in PLANS if plan.fits(rows, cell.outputs, cell.inputs)
                 and -(-cell.outputs // plan.block_n) * plan.splits >= self.device.info.num_cores // 2
                 and (plan.splits == 1 or cell.outputs <= 8192)]  # fmt: skip
        if chosen is not None and chosen not in plans:
            plans.append(chosen)
        found: dict[Plan, float] = {}
        for plan in plans:
            if self.left() < 2:
                break
            took = self.guarded(
                f"{name} {plan}",
                lambda plan=plan: checked(  # type: ignore[misc]
                    lambda w: self.linears.multiply(plan, x, w, out=out)
                ),
            )
            if took is not None:
                found[plan] = took
        size = weights[0].nbytes
        best = min(found, key=lambda plan: found[plan], default=None)
        self.tell(
            model=cell.model, linear=cell.name, rows=rows, bytes=size, library=base, mv=vector,
            best=str(best), seconds=found.get(best) if best else None, chosen=str(chosen),
            error=max(errors, default=None), plans={str(plan): took for plan, took in found.items()},
        )  # fmt: skip
        line = f"{name:16} library {_told(base, size)}"
        if rows == 1:
            line += f"  mv {_told(vector, size)}"
        if best is not None:
            ratio = f"{base / found[best]:.2f}x" if base else "-"
            line += f"  own {_told(found[best], size)} {ratio}  {best}, error {max(errors):.0e}"
            if chosen != best and chosen in found:
                line += f"; chosen {chosen}: {found[chosen] * 1e6:.1f}"
        print(line, flush=True)
        if self.options.all:
            for plan, took in sorted(found.items(), key=lambda entry: entry[1]):
                print(f"    {plan!s:24} {_told(took, size)}")

    def fusions(self, cell: Cell) -> None:
        """What a norm, a gate or a residual in the same kernel costs at one row."""
        weights, plan = self.weights(cell), self.best_few(cell)
        if plan is None:
            return
        x = self.inputs[:1, : cell.inputs].contiguous()
        both = self.inputs[:1, : 2 * cell.inputs].contiguous()
        norm = self.inputs[1, : cell.inputs]
        residual = self.inputs[2:3].repeat(1, 2)[:, : cell.outputs].contiguous()
        out = torch.empty(1, cell.outputs, dtype=self.dtype, device=self.where)
        forms: dict[str, tuple[Tensor, dict[str, Any]]] = {"plain": (x, {})}
        if cell.name in ("qkv", "gate_up"):
            forms["norm"] = (x, {"norm": norm, "eps": 1e-5})
        if cell.name in ("o", "down"):
            forms["residual"] = (x, {"residual": residual})
        if cell.name == "down":
            forms["gated"] = (both, {"gated": True})
            forms["gated, residual"] = (both, {"gated": True, "residual": residual})
        line = f"{cell.model} {cell.name:10} {plan}: "
        for name, (own, options) in forms.items():
            if self.left() < 1.5:
                break
            h, w = own.double(), weights[0].double()
            if "gated" in options:
                h = torch.nn.functional.silu(h[:, : cell.inputs]) * h[:, cell.inputs :]
            if "norm" in options:
                h = h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5) * norm.double()
            truth = h @ w.T + (residual.double() if "residual" in options else 0.0)

            def timed(
                own: Tensor = own, options: dict[str, Any] = options, truth: Tensor = truth
            ) -> float:
                out.fill_(float("nan"))
                self.linears.multiply(plan, own, weights[0], out=out, **options)
                error = ((out.double() - truth).abs().max() / truth.abs().max()).item()
                if not error <= LIMITS[self.options.dtype]:
                    raise RuntimeError(f"WRONG: error {error:.2e}")
                return self.seconds(
                    [
                        lambda w=w: self.linears.multiply(plan, own, w, out=out, **options)
                        for w in weights
                    ]
                )

            took = self.guarded(f"{cell.model} {cell.name} fused {name}", timed)
            self.tell(fused=name, of=f"{cell.model} {cell.name}", plan=str(plan), seconds=took)
            line += f"{name} {took * 1e6:.2f} us  " if took else f"{name} failed  "
        print(line, flush=True)

    def best_few(self, cell: Cell) -> Plan | None:
        """The quickest plan of multiply-adds at one row."""
        for line in self.lines:
            if (line.get("model"), line.get("linear"), line.get("rows")) == (
                cell.model,
                cell.name,
                1,
            ):
                few = {p: t for p, t in line["plans"].items() if p.startswith("few")}
                name = min(few, key=lambda plan: few[plan], default="")
                return next((plan for plan in PLANS if str(plan) == name), None)
        return None

    def steps(self) -> None:
        """All linears of a decode step: the library's, and the better one for each."""
        for model in LAYERS:
            for rows in self.options.rows:
                own = [line for line in self.lines if line.get("model") == model
                       and line["rows"] == rows and line["library"]]  # fmt: skip
                times = {cell.name: cell.times for cell in CELLS if cell.model == model}
                if {line["linear"] for line in own} != set(times):
                    continue
                library, mixed, chosen = (
                    sum(times[line["linear"]] * take(line) for line in own)
                    for take in (
                        lambda line: line["library"],
                        lambda line: min(line["library"], line["seconds"] or line["library"]),
                        lambda line: line["plans"].get(line["chosen"], line["library"]),
                    )
                )
                self.tell(step=model, rows=rows, library=library, mixed=mixed, chosen=chosen)
                print(
                    f"step {model} {rows:3} rows: library {library * 1e3:.3f} ms, best of both "
                    f"{mixed * 1e3:.3f} ms ({library / mixed:.3f}x), choose_plan {chosen * 1e3:.3f} ms"
                )

    def draws(self) -> None:
        """The drawing kernel, and torch's argmax beside it; logits lie in the cache, as in a step."""
        from halyard.hal.kernels.triton.kernels import TritonKernels

        kernels = TritonKernels(self.device)
        for rows in (1, 4, 16, 64, 256):
            logits = (self.pool[: rows * VOCAB].view(rows, VOCAB) * 100.0).contiguous()
            columns = torch.tensor(
                [[1.0, 1.0, 0.0, 0.0, 0.5]] * rows, device=self.where
            ).T.contiguous()
            filtered = columns.clone()
            filtered[1] = 0.9
            calls: dict[str, Call] = {
                "argmax": lambda logits=logits: torch.argmax(logits, -1),
                "greedy": lambda logits=logits: kernels.draw(logits, None, None),
                "random": lambda logits=logits, c=columns: kernels.draw(logits, None, c),
                "top_p": lambda logits=logits, c=filtered: kernels.draw(logits, None, c),
            }
            for pieces in (1, 8, 32):
                calls[f"greedy in {pieces}"] = lambda logits=logits, n=pieces: _split(
                    kernels, logits, n
                )
            line = f"draw {rows:3} rows:"
            for name, call in calls.items():
                if self.left() < 0.5:
                    break

                def timed(call: Call = call, name: str = name, logits: Tensor = logits) -> float:
                    if name.startswith("greedy"):
                        tokens = call()[0]  # type: ignore[index]
                        if not torch.equal(tokens, logits.argmax(-1)):
                            same = logits.gather(1, tokens[:, None])[:, 0] == logits.amax(-1)
                            if not same.all():
                                raise RuntimeError("WRONG tokens")
                    return self.seconds([call], 8)

                took = self.guarded(f"draw {rows} {name}", timed)
                self.tell(draw=name, rows=rows, seconds=took)
                line += f"  {name} {took * 1e6:.1f} us" if took else f"  {name} failed"
            print(line, flush=True)


def _split(kernels: Any, logits: Tensor, pieces: int) -> Any:
    """Draw with so many programs a row, whatever the number of rows."""
    launcher = kernels.drawing
    launcher.pieces = pieces
    try:
        return launcher.draw(logits, None, None)
    finally:
        launcher.pieces = None


def _told(seconds: float | None, size: int) -> str:
    if seconds is None:
        return "   failed          "
    return f"{seconds * 1e6:7.1f} us {size / seconds / 1e12:5.2f} TB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--only", default="", help="cells whose 'model name' contains this")
    parser.add_argument("--dtype", default="bfloat16", choices=list(LIMITS))
    parser.add_argument("--budget", type=float, default=55.0, help="seconds; later cells are left")
    parser.add_argument("--all", action="store_true", help="every configuration's figure")
    parser.add_argument("--no-draw", action="store_true")
    parser.add_argument("--out", metavar="FILE", help="append JSON lines")
    parser.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    import triton

    bench = Bench(options)
    told = f"{bench.device.info.name}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{told}, {options.dtype}", flush=True)
    bench.tell(device=bench.device.info.name, torch=torch.__version__, triton=triton.__version__,
               dtype=options.dtype)  # fmt: skip
    with torch.inference_mode():
        for rows in options.rows:
            for cell in bench.cells():
                if f"{cell.model} {cell.name} {rows}" in options.done:
                    continue
                if bench.left() < 2:
                    print(f"{cell.model} {cell.name} {rows}: left out, the budget is spent")
                    continue
                bench.run(cell, rows)
            if rows == 1:
                for cell in bench.cells():
                    if cell.name != "lm_head" and bench.left() > 2:
                        bench.fusions(cell)
                if not options.no_draw:
                    bench.draws()
    bench.steps()
    print(f"{time.perf_counter() - bench.started:.0f} s")


if __name__ == "__main__":
    main()
