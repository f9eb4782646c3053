"""hw_matrix.yaml: the shipped file is sound, and every mistake is one line that names its line."""

from pathlib import Path

import pytest

from halyard.hal.errors import ConfigError
from halyard.hal.matrix import STATUSES, load_matrix
from halyard.hal.registry import part_names

ROW = """\
backends:
  - name: one
    device: cpu
    kernels: reference
    graph: eager
    dtypes: [float32]
    status: untested
"""


def load(folder: Path, text: str):
    path = folder / "hw_matrix.yaml"
    path.write_text(text)
    return load_matrix(path)


def test_shipped_file_is_sound():
    matrix = load_matrix()
    names = [row.name for row in matrix.rows]
    assert {"reference", "null", "cpu", "onnx", "tvm", "cuda", "rocm"} <= set(names)
    assert len(names) == len(set(names))
    for row in matrix.rows:
        assert row.status in STATUSES
        assert row.role, f"{row.name} tells people nothing"
        assert row.status != "verified" or row.evidence is not None
        if row.status == "unsupported":
            assert row.note, f"{row.name} does not say why it is unsupported"
    assert "cpu" in matrix.select
    assert "null" not in matrix.select, "a backend that computes nothing must be asked for"


def test_a_row_that_claims_to_run_has_all_its_parts():
    for row in load_matrix().rows:
        if row.status != "unsupported":
            assert row.device in part_names("devices")
            assert row.kernels in part_names("kernels")
            assert row.graph in part_names("graphs")


def test_defaults_of_a_row(tmp_path):
    row = load(tmp_path, ROW).row("one")
    assert row.kv_dtypes == ("float32",)
    assert row.line == 2
    assert (row.vendors, row.archs, row.quantisation, row.evidence) == ((), (), (), None)


def test_a_row_says_what_its_machine_costs(tmp_path: Path):
    assert load(tmp_path, ROW + "    cost_per_hour: 2.49\n").row("one").cost_per_hour == 2.49
    assert load(tmp_path, ROW + "    cost_per_hour: 3\n").row("one").cost_per_hour == 3.0
    assert load(tmp_path, ROW).row("one").cost_per_hour is None


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (ROW + "extra: 1\n", 8, "unknown key 'extra'"),
        (ROW + "    colour: red\n", 8, "unknown key 'colour'"),
        (ROW + "    status: compiles\n", 8, "'status' stands twice"),
        (ROW + ROW.removeprefix("backends:\n"), 8, "backend 'one' stands twice"),
        (ROW.replace("untested", "verified"), 7, "needs evidence"),
        (ROW + "    evidence: gone.json\n", 8, "gone.json does not exist"),
        (ROW.replace("untested", "perfect"), 7, "status must be one of"),
        (ROW.replace("[float32]", "float32"), 6, "must be a list"),
        (ROW.replace("[float32]", "[float31]"), 6, "unknown dtype 'float31'"),
        (ROW.replace("    graph: eager\n", ""), 2, "a backend needs 'graph'"),
        (ROW.replace("graph: eager", "graph: null"), 5, "put null in quotes"),
        (ROW.replace("name: one", "name: 3"), 2, "put 3 in quotes"),
        (ROW.replace("kernels: reference", "kernels: nativ"), 4, "needs kernels 'nativ'"),
        (ROW + "    match: {vendor: [intel], colour: [red]}\n", 8, "unknown key 'colour'"),
        (ROW + "    match: intel\n", 8, "match must be a mapping"),
        (ROW + "select:\n  - one\n  - two\n", 10, "select names 'two'"),
        (ROW + "select: [one, one]\n", 8, "select names 'one' twice"),
        (ROW + "    cost_per_hour: free\n", 8, "a number greater than 0"),
        (ROW + "    cost_per_hour: -2.5\n", 8, "a number greater than 0"),
        (ROW + "    cost_per_hour: .nan\n", 8, "a number greater than 0"),
        (ROW + "    cost_per_hour: yes\n", 8, "a number greater than 0"),
        (ROW + "pools: 3\n", 8, "pools must be a list"),
        (ROW + "pools: [!odd 3]\n", 8, "could not determine a constructor"),
        ("backends: 3\n", 1, "backends must be a list"),
        ("", 1, "the file must be a mapping"),
        ("backends: [\n", 2, "expected"),
        (ROW + "a: b: c\n", 8, "mapping values are not allowed"),
        (ROW + "\x00", 1, "special characters"),
    ],
)
def test_a_mistake_names_its_line(tmp_path, text, line, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    told = str(caught.value)
    assert told.startswith(f"hw_matrix.yaml:{line}: "), told
    assert words in told
    assert "\n" not in told


def test_an_unsupported_row_may_name_parts_that_do_not_exist(tmp_path):
    text = ROW.replace("untested", "unsupported").replace("reference", "quantum")
    assert load(tmp_path, text).row("one").kernels == "quantum"


def test_verified_with_evidence(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    text = ROW.replace("untested", "verified") + "    evidence: report.json\n"
    assert load(tmp_path, text).row("one").evidence == tmp_path.resolve() / "report.json"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="can't read"):
        load_matrix(tmp_path / "gone.yaml")
    path = tmp_path / "hw_matrix.yaml"
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_matrix(path)


def test_the_environment_names_another_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(ROW)
    monkeypatch.setenv("HALYARD_MATRIX", str(path))
    assert [row.name for row in load_matrix().rows] == ["one"]


def test_unknown_backend_lists_the_known(tmp_path):
    with pytest.raises(ConfigError, match="known are one"):
        load(tmp_path, ROW).row("two")
