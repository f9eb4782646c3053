"""docs/api.md is up to date, and what it calls honoured is at least read somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "ci/api_docs.py", "--check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "pkg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_honoured_is_read() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "api").glob("*.py"))
    sources += "".join(path.read_text() for path in (ROOT / "api" / "controllers").glob("*.py"))
    honoured = set(re.findall(r"\| `(\w+)` \| honoured", PAGE))
    assert len(honoured) > 50
    unread = [name for name in honoured if not re.search(rf"[.\"\']{name}\b", sources)]
    assert unread == []


def test_every_endpoint_has_its_table() -> None:
    for name in ("chat/completions", "completions", "responses", "messages"):
        assert f"## POST /v1/{name}\n" in PAGE
