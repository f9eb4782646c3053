"""Registry and selection: out-of-tree parts, parts that fail, and all the reasons for a choice."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from halyard.hal import registry
from halyard.hal.contract import CONTRACT_VERSION
from halyard.hal.errors import BackendUnavailableError, ConfigError, ContractError
from halyard.hal.matrix import load_matrix
from halyard.hal.selection import probe_backend, resolve_dtype, select_backend
from halyard.hal.types import DeviceInfo, Requirements

NEED = Requirements("float32", "float32", 16, num_heads=4, num_kv_heads=2, head_dim=16)
CPU = DeviceInfo("cpu", "intel", "x86_64", "a CPU", 2**34, 2)

MATRIX = """\
backends:
  - {name: strange, device: cpu, kernels: strange, graph: eager, dtypes: [float32],
     status: untested}
  - {name: plain, device: cpu, kernels: reference, graph: eager, dtypes: [float32, bfloat16],
     status: untested}
  - {name: far, device: moon, kernels: lunar, graph: tidal, dtypes: [float32],
     status: unsupported, note: not built yet}
  - {name: foreign, device: cpu, kernels: reference, graph: eager, dtypes: [float32],
     match: {vendor: [acme], arch: [z80]}, status: untested}
select: [strange, plain]
"""


@pytest.fixture
def plug(tmp_path, monkeypatch):
    """plug(source) installs kernels "strange" from a module of that source, as an entry point."""

    def clear():
        registry._targets.cache_clear()
        registry.load_part.cache_clear()

    def install(source: str) -> None:
        (tmp_path / "strange_part.py").write_text(source)
        sys.modules.pop("strange_part", None)
        monkeypatch.syspath_prepend(str(tmp_path))

        def points(group: str) -> list[EntryPoint]:
            found = [EntryPoint("strange", "strange_part:Part", group)]
            return found if group == "halyard.kernels" else []

        monkeypatch.setattr(registry, "entry_points", points)
        clear()

    yield install
    sys.modules.pop("strange_part", None)
    clear()


@pytest.fixture
def matrix(tmp_path: Path, plug):
    plug(GOOD)
    path = tmp_path / "m.yaml"
    path.write_text(MATRIX)
    return load_matrix(path)


GOOD = """
from halyard.hal.kernels.reference.kernels import ReferenceKernels
class Part(ReferenceKernels):
    pass
"""


def test_an_entry_point_is_a_part(plug):
    plug(GOOD)
    assert "strange" in registry.part_names("kernels")
    assert registry.load_part("kernels", "strange").__name__ == "Part"
    assert registry.probe_part("kernels", "strange", CPU).available


def test_a_module_of_our_own_is_nothing_to_install(plug):
    plug("import halyard.hal.gone")
    (reason,) = registry.probe_part("kernels", "strange", CPU).reasons
    assert "pip install" not in reason


def test_an_installed_distribution_is_found_by_its_metadata(tmp_path, monkeypatch, plug):
    """As pip leaves it: nothing of importlib.metadata is replaced."""
    (tmp_path / "acme_part.py").write_text(GOOD)
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[halyard.kernels]\nacme = acme_part:Part\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._targets.cache_clear()  # plug clears them again at the end
    registry.load_part.cache_clear()
    assert registry.load_part("kernels", "acme").__module__ == "acme_part"


def test_what_is_built_in_needs_no_installation(plug):
    plug(GOOD)  # hides the entry points of an installed Halyard
    assert set(registry.part_names("devices")) == {"cpu", "cuda", "rocm"}
    assert {"null", "reference", "native"} <= set(registry.part_names("kernels"))
    assert {"null", "eager", "inductor"} <= set(registry.part_names("graphs"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_library.deep", "pip install no_such_library"),
        ("import halyard.hal.gone", "there is no module halyard.hal.gone"),
        ("def broken(:", "can't be imported: SyntaxError"),
        ("raise RuntimeError('driver\\nis old')", "RuntimeError: driver is old"),
        ("class Other: pass", "has no attribute 'Part'"),
        ("class Part: pass", "was built for contract no"),
        ("class Part: contract_version = (999, 0)", "was built for contract 999.0"),
    ],
)
def test_a_part_that_fails_is_a_reason_for_itself_alone(matrix, plug, source, words):
    plug(source)
    (reason,) = registry.probe_part("kernels", "strange", CPU).reasons
    assert words in reason
    assert "\n" not in reason
    selection = select_backend(matrix, NEED, "float32")
    assert selection.row.name == "plain"
    assert words in " ".join(selection.others[0].reasons)


def test_another_major_version_is_refused(plug):
    plug(f"class Part: contract_version = ({CONTRACT_VERSION[0] + 1}, 0)")
    with pytest.raises(ContractError, match="install a matching version"):
        registry.load_part("kernels", "strange")


def test_another_minor_version_is_taken(plug):
    plug(f"class Part: contract_version = ({CONTRACT_VERSION[0]}, 99)")
    assert registry.load_part("kernels", "strange").contract_version[1] == 99


def test_unknown_part_lists_the_known():
    with pytest.raises(ConfigError, match="known are eager, inductor, null"):
        registry.load_part("graphs", "nothing")


def test_all_reasons_of_all_three_parts(matrix):
    reasons = " ".join(probe_backend(matrix.row("far")).reasons)
    for word in ("not built yet", "'moon'", "'lunar'", "'tidal'"):
        assert word in reasons


def test_a_row_for_other_hardware(matrix):
    reasons = " ".join(probe_backend(matrix.row("foreign")).reasons)
    assert "acme" in reasons
    assert "z80" in reasons


def test_first_of_the_order_wins_and_every_other_is_reported(matrix):
    selection = select_backend(matrix, NEED, "float32")
    assert selection.row.name == "strange"
    assert {report.row.name for report in selection.others} == {"plain", "far", "foreign"}


def test_a_requested_backend_that_cannot_run(matrix):
    with pytest.raises(BackendUnavailableError) as caught:
        select_backend(matrix, NEED, "float32", requested="far")
    told = str(caught.value)
    assert "'far'" in told
    assert "'moon'" in told
    assert "'lunar'" in told
    assert "\n" not in told


def test_a_requested_backend_is_never_replaced(matrix):
    assert select_backend(matrix, NEED, "float32", requested="plain").row.name == "plain"
    with pytest.raises(BackendUnavailableError, match="dtype bfloat16"):
        select_backend(matrix, NEED, "float32", requested="strange", dtype="bfloat16")


def test_a_slip_of_the_finger_is_understood(matrix):
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        select_backend(matrix, NEED, "float32", requested="plian")


@pytest.mark.parametrize(
    ("requested", "checkpoint", "native", "expected", "word"),
    [
        ("auto", "bfloat16", ("float32", "bfloat16"), "bfloat16", "checkpoint"),
        ("auto", "bfloat16", ("float32",), "float32", "no arithmetic"),
        ("auto", "float32", ("float32",), "float32", "checkpoint"),
        ("bfloat16", "float32", ("float32",), "bfloat16", "asked for"),
    ],
)
def test_dtype(matrix, requested, checkpoint, native, expected, word):
    device = DeviceInfo("cpu", "intel", "x86_64", "a CPU", 2**34, 2, native_dtypes=native)
    dtype, why = resolve_dtype(requested, checkpoint, matrix.row("plain"), device)
    assert dtype == expected
    assert word in why
