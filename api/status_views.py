"""Pictures, blocks and reports in the form that the page draws. No torch."""

import base64
import json
import time
from collections import Counter
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from halyard.api.schemas.status import (
    Blocks,
    ConformanceCell,
    ConformanceMatrix,
    ConformanceRow,
    Live,
    SequenceView,
)
from halyard.hal.conformance.levels import LEVELS, MUTANTS
from halyard.hal.conformance.results import BAD, split_id
from halyard.hal.matrix import load_matrix
from halyard.runtime.block_pool import BLANK, CACHED, SHARED, USED
from halyard.runtime.picture import EnginePicture, SequenceRow

__all__ = ["conformance", "live", "pack_blocks"]

_HIDDEN = "another tenant's"


def live(picture: EnginePicture, tenant: str | None) -> Live:
    """A picture for a tenant, who sees the others' requests but not their names; None sees all."""
    now = time.monotonic()
    return Live(
        available=True,
        block_size=picture.block_size,
        running=picture.num_running,
        waiting=picture.num_waiting,
        swapped=picture.num_swapped,
        sequences=[_view(row, now, tenant) for row in picture.rows],
        device=pack_blocks(picture.device_blocks),
        host=pack_blocks(picture.host_blocks) if picture.host_blocks else None,
    )


def _view(row: SequenceRow, now: float, tenant: str | None) -> SequenceView:
    own = tenant is None or row.tenant == tenant
    name = f"{row.request_id}/{row.answer}" if row.answer else row.request_id
    return SequenceView(
        id=name if own else _HIDDEN,
        tenant=row.tenant if own else "",
        state=row.state,
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        computed_tokens=row.computed_tokens,
        answer_tokens=row.answer_tokens,
        max_tokens=row.max_tokens,
        blocks=row.blocks,
        age_seconds=max(0.0, now - row.arrival),
    )


def pack_blocks(states: bytes) -> Blocks:
    """Four blocks a byte: a hundred thousand are 33 KB of text, in less than a millisecond."""
    codes = np.frombuffer(states, dtype=np.uint8)
    counts = np.bincount(codes, minlength=4)
    padded = np.zeros(-(-len(codes) // 4) * 4, dtype=np.uint8)
    padded[: len(codes)] = codes
    quads = padded.reshape(-1, 4)
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    return Blocks(
        count=len(codes),
        states=base64.b64encode(packed.tobytes()).decode("ascii"),
        free=int(counts[BLANK]),
        cached=int(counts[CACHED]),
        used=int(counts[USED]),
        shared=int(counts[SHARED]),
    )


def conformance(running: str | None) -> ConformanceMatrix:
    """Every backend of the matrix, with the reports that lie in the package."""
    levels = {level.name: level.title for level in (*LEVELS, MUTANTS)}
    return ConformanceMatrix(levels, list(_rows()), running)


@lru_cache(1)
def _rows() -> tuple[ConformanceRow, ...]:
    reports = files("halyard.hal.conformance").joinpath("reports")
    made = []
    for row in load_matrix().rows:
        report: dict[str, Any] = {}
        file = reports.joinpath(row.name, "results.json")
        if file.is_file():
            report = json.loads(file.read_text(encoding="utf-8"))
        made.append(
            ConformanceRow(
                backend=row.name,
                device=row.device,
                kernels=row.kernels,
                graph=row.graph,
                status=row.status,
                role=row.role,
                date=report.get("date", "")[:10] or None,
                hardware=(report.get("device") or {}).get("name"),
                dtypes=_cells(report.get("results", [])),
            )
        )
    return tuple(made)


def _cells(results: list[dict[str, Any]]) -> dict[str, dict[str, ConformanceCell]]:
    counts: dict[str, dict[str, Counter[str]]] = {}
    for result in results:
        level, _, dtype = split_id(result["id"])
        own = counts.setdefault(dtype or "any", {}).setdefault(level, Counter())
        own["failed" if result["status"] in BAD else result["status"]] += 1
    return {
        dtype: {
            level: ConformanceCell(n["passed"], n["failed"], n["not_claimed"])
            for level, n in by_level.items()
        }
        for dtype, by_level in counts.items()
    }
