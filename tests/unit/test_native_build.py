"""Building the native library: what a compiler refuses is told in one line, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from halyard.hal.errors import BackendUnavailableError
from halyard.hal.kernels.native.library import SOURCES, _build


def _compiler(folder: Path, script: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# Writes what it was called with to the file behind -o.
_WRITES = 'for one; do [ "$last" = -o ] && printf "%s\\n" "$*" > "$one"; last="$one"; done'


def test_every_file_is_compiled_and_all_are_linked(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "kernels.so"
    _build(_compiler(tmp_path, _WRITES), ["-O1"], target)
    link = target.read_text().split()
    assert "-shared" in link
    assert [Path(one).name for one in link if one.endswith(".o")] == [
        f"{s.stem}.o" for s in SOURCES
    ]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("where", ["*quantized.cpp*", "*-shared*"])
def test_an_error_is_told_and_nothing_is_left(tmp_path: Path, where: str) -> None:
    target = tmp_path / "cache" / "kernels.so"
    refuses = f'case "$*" in {where}) echo "no such thing\nmore" >&2; exit 1;; esac; {_WRITES}'
    with pytest.raises(
        BackendUnavailableError, match=r"can't build the native kernels: no such thing$"
    ):
        _build(_compiler(tmp_path, refuses), [], target)
    assert not list(target.parent.iterdir())
