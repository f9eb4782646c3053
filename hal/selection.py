"""Chooses a backend and says, for every other one, all the reasons why not."""

from __future__ import annotations

from dataclasses import dataclass

from halyard.hal.errors import BackendUnavailableError
from halyard.hal.matrix import BackendRow, Matrix
from halyard.hal.registry import load_part, part_problem, probe_device, probe_part
from halyard.hal.types import DeviceInfo, DType, Requirements

__all__ = ["BackendReport", "Selection", "probe_backend", "resolve_dtype", "select_backend"]


@dataclass(frozen=True, slots=True)
class BackendReport:
    """Whether a backend can run here, and everything that speaks against it."""

    row: BackendRow
    reasons: tuple[str, ...]  # empty: it can run
    device: DeviceInfo | None = None

    @property
    def available(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen backend, the dtype it will use, and the others."""

    row: BackendRow
    device: DeviceInfo
    dtype: DType
    dtype_reason: str  # why that dtype
    others: tuple[BackendReport, ...]  # in order of preference; later ones weren't asked


def probe_backend(row: BackendRow) -> BackendReport:
    """Probe all three parts of a backend on this machine."""
    reasons: list[str] = []
    if row.status == "unsupported":
        reasons.append(row.note or "marked unsupported in the matrix")
    probe = probe_device(row.device)
    reasons += probe.reasons
    info = probe.info
    if info is not None and probe.available:
        if row.vendors and info.vendor not in row.vendors:
            reasons.append(f"is for vendor {', '.join(row.vendors)}, this is {info.vendor}")
        if row.archs and info.arch not in row.archs:
            reasons.append(f"is for arch {', '.join(row.archs)}, this is {info.arch}")
        reasons += probe_part("kernels", row.kernels, info).reasons
        reasons += probe_part("graphs", row.graph, info).reasons
    else:  # without the device there is nothing to ask them, but they may be missing as well
        problems = (part_problem("kernels", row.kernels), part_problem("graphs", row.graph))
        reasons += [problem for problem in problems if problem is not None]
    return BackendReport(row, tuple(dict.fromkeys(reasons)), info)


def resolve_dtype(
    requested: str, checkpoint: DType, row: BackendRow, device: DeviceInfo
) -> tuple[DType, str]:
    """The dtype to compute in, and why."""
    if requested != "auto":
        return requested, "asked for"  # type: ignore[return-value]
    if checkpoint in row.dtypes and checkpoint in device.native_dtypes:
        return checkpoint, "the checkpoint's"
    return "float32", f"{device.kind} has no arithmetic in the checkpoint's {checkpoint} here"


def select_backend(
    matrix: Matrix,
    need: Requirements,
    checkpoint_dtype: DType,
    *,
    requested: str | None = None,
    dtype: str = "auto",
) -> Selection:
    """Take the requested backend, or the first of `select` that can run this model here.

    Args:
        need: what the model asks of kernels; its dtypes are replaced by the resolved one.

    Raises:
        ConfigError: no such backend.
        BackendUnavailableError: it, or every one, can't run; the text holds all reasons.
    """
    order = [matrix.row(requested)] if requested else [matrix.row(name) for name in matrix.select]
    chosen: tuple[BackendReport, DType, str] | None = None
    others: list[BackendReport] = []
    for row in order:
        if chosen is not None:  # what comes later isn't asked: that would import its packages
            others.append(BackendReport(row, (), None))
            continue
        report = probe_backend(row)
        if report.available and report.device is not None:
            own, why = resolve_dtype(dtype, checkpoint_dtype, row, report.device)
            missing = _unmet(row, need, own)
            if not missing:
                chosen = (report, own, why)
                continue
            report = BackendReport(row, tuple(missing), report.device)
        others.append(report)
    if chosen is None:
        told = "; ".join(f"{r.row.name}: {', '.join(r.reasons)}" for r in others)
        what = f"backend {requested!r} can't run here" if requested else "no backend can run here"
        raise BackendUnavailableError(f"{what}: {told}")
    known = {row.name for row in order}
    by_name = ("taken when asked for by name",)
    others += [BackendReport(row, by_name, None) for row in matrix.rows if row.name not in known]
    report, own, why = chosen
    if report.device is None:
        raise AssertionError("an available backend has a device")
    return Selection(report.row, report.device, own, why, tuple(others))


def _unmet(row: BackendRow, need: Requirements, dtype: DType) -> list[str]:
    from dataclasses import replace

    reasons = []
    if dtype not in row.dtypes:
        reasons.append(f"dtype {dtype} (has {', '.join(row.dtypes)})")
    capabilities = load_part("kernels", row.kernels).capabilities
    reasons += capabilities.missing(replace(need, dtype=dtype, kv_dtype=dtype))
    return list(dict.fromkeys(reasons))
