"""The file of API keys: who may read it, and what is wrong with one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from halyard.api.cli.main import main
from halyard.api.keys import KeyRing, edit_keys, read_keys
from halyard.hal.errors import ConfigError


def test_the_file_of_keys_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with edit_keys(path):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyRing(path).find(b"hal-x") is None
    for text, complaint in (
        ("[]", "no file of API keys"),
        ('{"version": 2}', "version 2"),
        ('{"tenants": {"../x": {}}}', "names are up to"),
        ('{"tenants": {"a": {"tokens_per_minute": 0}}}', "at least 1"),
        ('{"tenants": {"a": {"tokens": 5}}}', "unknown field"),
        (
            '{"keys": [{"id": "1", "tenant": "b", "salt": "", "sha256": "", "created": 1}]}',
            "not there",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            read_keys(path)
    with pytest.raises(ConfigError, match="halyard keys create"):
        KeyRing(tmp_path / "none.json")
    assert main(["keys", "create", "a", "--days", "-1", "--api-keys", str(tmp_path / "k")]) == 2
    assert main(["keys", "revoke", "nobody", "--api-keys", str(path)]) == 2
