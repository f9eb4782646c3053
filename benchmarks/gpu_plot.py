"""A picture of GPU throughput beside the peer's and the device's limits.

PYTHONPATH=pkg python benchmarks/gpu_plot.py benchmarks/results/h{100,200}_throughput.jsonl OUT.svg

A bar is the best figure of a cell, of one file of results, as a multiple of vLLM 0.26 on the same
requests on an H100 80GB; a line across it is what an H100's measured bandwidth and arithmetic allow,
where that was counted (an H200 reads memory faster).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpu_throughput import PEERS

# Tokens a second at the limit: 3.03 TB/s of copies, 791 TFLOP/s of bf16 products.
LIMITS = {
    "1b": {"single": 1220, "decode": 128_000},
    "8b": {"single": 202, "decode": 26_900, "prefill": 46_000},
}
ORDER = ("mixed", "decode", "prefill", "prefix", "single")
_COLOURS = ("#a8bcd0", "#4878a8")  # by file
_WIDTH, _HEIGHT, _FLOOR, _UNIT = 760, 340, 280, 58.0  # pixels; _UNIT: of one multiple


def main() -> int:
    *sources, target = map(Path, sys.argv[1:])
    found = [_best(source) for source in sources]
    names = [source.stem.split("_")[0].upper() for source in sources]
    wide = 52 / len(sources)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        '<text x="20" y="22" font-size="14">Tokens a second, as multiples of vLLM 0.26 on an H100 '
        "(dark lines: an H100's limit)</text>",
        *(
            f'<rect x="{580 + 70 * number}" y="12" width="10" height="10" fill="{_COLOURS[number]}"/>'
            f'<text x="{594 + 70 * number}" y="22">{name}</text>'
            for number, name in enumerate(names)
        ),
        f'<line x1="20" x2="{_WIDTH - 20}" y1="{_FLOOR - _UNIT}" y2="{_FLOOR - _UNIT}" '
        'stroke="#c0573e" stroke-dasharray="4 3"/>',
    ]
    x = 30.0
    for shape in PEERS:
        for workload in ORDER:
            peer, label = PEERS[shape][workload], f"{shape} {workload}"
            most = 0.0
            for number, best in enumerate(found):
                rate = best.get((shape, workload), 0.0)
                height, left = _UNIT * rate / peer, x + number * wide
                most = max(most, rate)
                parts.append(
                    f'<rect x="{left:.1f}" y="{_FLOOR - height:.1f}" width="{wide:.1f}" '
                    f'height="{height:.1f}" fill="{_COLOURS[number]}"/>'
                )
            top = _FLOOR - _UNIT * most / peer
            limit = LIMITS[shape].get(workload)
            if limit and top - 34 < _FLOOR - _UNIT * limit / peer < top:
                top = _FLOOR - _UNIT * limit / peer  # the words go above the line
            parts.append(_text(x + 26, top - 18, f"{most:,.0f}" if most else "not run"))
            parts.append(_text(x + 26, top - 4, f"{most / peer:.2f}x"))
            if limit:
                y = _FLOOR - _UNIT * limit / peer
                parts.append(
                    f'<line x1="{x - 4}" x2="{x + 56}" y1="{y:.1f}" y2="{y:.1f}" stroke="#222" '
                    'stroke-width="2"/>'
                )
            parts.append(_text(x + 26, _FLOOR + 16, label))
            x += 70
        x += 14
    target.write_text("\n".join([*parts, "</svg>"]) + "\n")
    return 0


def _best(source: Path) -> dict[tuple[str, str], float]:
    """By (shape, workload)."""
    best: dict[tuple[str, str], float] = {}
    for line in source.read_text().splitlines():
        row = json.loads(line)
        kind = "total" if row["workload"] == "prefill" else "output"
        cell = (row["shape"], row["workload"])
        best[cell] = max(best.get(cell, 0.0), row[f"{kind}_tokens_per_second"])
    return best


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" font-size="11">{words}</text>'


if __name__ == "__main__":
    sys.exit(main())
