"""Expands hw_matrix.yaml into the lanes CI runs here: one line of JSON, for a workflow's matrix.

python ci/matrix.py            {"include": [{"backend": "cpu", "dtype": "float32"}, ...]}
python ci/matrix.py --all      every row, with the reasons why it has no lane here
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pkg"))

from halyard.hal.matrix import load_matrix
from halyard.hal.selection import probe_backend


def lanes(matrix_path: Path | None = None) -> list[dict[str, str]]:
    """A lane for each dtype of each backend that can run on this machine."""
    return [
        {"backend": row.name, "dtype": dtype, "status": row.status}
        for row in load_matrix(matrix_path).rows
        if probe_backend(row).available
        for dtype in row.dtypes
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", type=Path, help="another hw_matrix.yaml")
    parser.add_argument("--all", action="store_true", help="say why a backend has no lane here")
    args = parser.parse_args()
    if args.all:
        for row in load_matrix(args.matrix).rows:
            reasons = probe_backend(row).reasons
            print(f"{row.name:<10} {'; '.join(reasons) or 'runs here'}")
        return 0
    print(json.dumps({"include": lanes(args.matrix)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
