"""Every row of docs/security.md names a test, or a script, that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`((?:[\w/]+/)?\w+\.py)?(?:::(\w+))?`")


def test_every_row_names_what_is_there() -> None:
    table = (ROOT / "docs" / "security.md").read_text().split("## Known limits")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    files = [file for top in ("tests", "benchmarks") for file in (ROOT / top).rglob("*.py")]
    for row in rows:
        named = NAMED.findall(row.rsplit(" | ", 1)[1])
        assert named, row
        file = ""
        for path, test in named:
            if path:
                (found,) = [file for file in files if file.as_posix().endswith("/" + path)]
                file = found.read_text()
            assert not test or f"def {test}(" in file, f"{path}::{test}"
