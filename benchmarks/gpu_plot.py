"""A picture of GPU throughput beside the peer's and the device's limits.

PYTHONPATH=pkg python benchmarks/gpu_plot.py benchmarks/results/h100_throughput.jsonl OUT.svg

A bar is the best figure of a cell as a multiple of vLLM 0.26 on the same requests and kind of card (an
H100 80GB); a line across it is what the card's measured bandwidth and arithmetic allow, where
that was counted.
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
_WIDTH, _HEIGHT, _FLOOR, _UNIT = 760, 340, 280, 58.0  # pixels; _UNIT: of one multiple


def main() -> int:
    source, target = map(Path, sys.argv[1:3])
    best: dict[tuple[str, str], float] = {}
    for line in source.read_text().splitlines():
        row = json.loads(line)
        kind = "total" if row["workload"] == "prefill" else "output"
        cell = (row["shape"], row["workload"])
        best[cell] = max(best.get(cell, 0.0), row[f"{kind}_tokens_per_second"])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        '<text x="20" y="22" font-size="14">Tokens a second, as multiples of vLLM 0.26 on an H100 '
        "(dark lines: the card's limit)</text>",
        f'<line x1="20" x2="{_WIDTH - 20}" y1="{_FLOOR - _UNIT}" y2="{_FLOOR - _UNIT}" '
        'stroke="#c0573e" stroke-dasharray="4 3"/>',
    ]
    x = 30.0
    for shape in PEERS:
        for workload in ORDER:
            rate, peer = best.get((shape, workload)), PEERS[shape][workload]
            label = f"{shape} {workload}"
            if rate is None:
                parts.append(_text(x + 26, _FLOOR - 6, "not run"))
            else:
                height = _UNIT * rate / peer
                parts.append(
                    f'<rect x="{x}" y="{_FLOOR - height:.1f}" width="52" height="{height:.1f}" '
                    'fill="#4878a8"/>'
                )
                parts.append(_text(x + 26, _FLOOR - height - 18, f"{rate:,.0f}"))
                parts.append(_text(x + 26, _FLOOR - height - 4, f"{rate / peer:.2f}x"))
            limit = LIMITS[shape].get(workload)
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


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" font-size="11">{words}</text>'


if __name__ == "__main__":
    sys.exit(main())
