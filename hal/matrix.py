"""hw_matrix.yaml: which backends there are, how well each is proven, and which is preferred."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from halyard.hal.errors import ConfigError
from halyard.hal.registry import Axis, load_part, part_names
from halyard.hal.types import DType

__all__ = ["STATUSES", "BackendRow", "Matrix", "load_matrix"]

STATUSES = ("verified", "compiles", "untested", "unsupported")
_TOP = {"backends", "select", "pools"}
_ROW = {"name", "device", "kernels", "graph", "match", "dtypes", "kv_dtypes", "quantisation",
        "status", "evidence", "role", "note", "cost_per_hour"}  # fmt: skip
_MATCH = {"vendor", "arch"}
_TEXT_TAG = "tag:yaml.org,2002:str"
_AXES: dict[str, Axis] = {"device": "devices", "kernels": "kernels", "graph": "graphs"}


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One backend: a device, a kernel set, a graph compiler, and what is known about the three."""

    name: str
    device: str
    kernels: str
    graph: str
    dtypes: tuple[DType, ...]
    kv_dtypes: tuple[DType, ...]
    status: str  # one of STATUSES
    role: str  # one line for people
    quantisation: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()  # empty: any
    archs: tuple[str, ...] = ()  # empty: any
    evidence: Path | None = None  # a conformance report; required when verified
    note: str = ""
    cost_per_hour: float | None = None  # of such a machine, in the operator's currency
    line: int = 0  # where it stands in the file


@dataclass(frozen=True, slots=True)
class Matrix:
    """The whole file, validated."""

    path: Path
    rows: tuple[BackendRow, ...]
    select: tuple[str, ...]  # names in order of preference
    pools: tuple[dict[str, Any], ...]  # groups of nodes of a cluster

    def row(self, name: str) -> BackendRow:
        """The row of that name; "device:kernels:graph" makes one of parts that have none.

        Raises:
            ConfigError: no such row, or no such part.
        """
        for row in self.rows:
            if row.name == name:
                return row
        if name.count(":") == 2:
            return _row_of_parts(name)
        names = [row.name for row in self.rows]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"no backend {name!r}: {hint}known are {', '.join(names)}; or give device:kernels:graph"
        )


def _row_of_parts(name: str) -> BackendRow:
    """Parts that no row of the file names, an out-of-tree kernel set say, as a backend."""
    device, kernels, graph = name.split(":")
    for axis, part in (("devices", device), ("kernels", kernels), ("graphs", graph)):
        if part not in part_names(axis):  # type: ignore[arg-type]
            known = ", ".join(part_names(axis))  # type: ignore[arg-type]
            raise ConfigError(f"backend {name!r}: no {axis} part {part!r} (known: {known})")
    dtypes = load_part("kernels", kernels).capabilities.dtypes
    return BackendRow(
        name, device, kernels, graph, dtypes, dtypes, "untested", "parts named by hand"
    )


def default_path() -> Path:
    """HALYARD_MATRIX, or the file that ships (beside the package's root, or in the checkout)."""
    if "HALYARD_MATRIX" in os.environ:
        return Path(os.environ["HALYARD_MATRIX"])
    import halyard

    return Path(halyard.__path__[0]) / "hw_matrix.yaml"


def load_matrix(path: Path | None = None) -> Matrix:
    """Read and validate the file.

    Raises:
        ConfigError: "hw_matrix.yaml:LINE: what is wrong".
    """
    path = path or default_path()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}:1: not a text in UTF-8") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path.name}:{line}: {problem}") from error
    return _Reader(path).matrix(root)


class _Reader:
    """Turns YAML nodes into values; every complaint names the line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, node: yaml.Node | None, text: str) -> ConfigError:
        line = node.start_mark.line + 1 if node is not None else 1
        return ConfigError(f"{self.path.name}:{line}: {text}")

    def mapping(self, node: yaml.Node | None, known: set[str], what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value)
            if name not in known:
                raise self.fail(
                    key, f"unknown key {name!r} in {what} (known: {', '.join(sorted(known))})"
                )
            if name in found:
                raise self.fail(key, f"{name!r} stands twice in {what}")
            found[name] = value
        return found

    def text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self.fail(node, f"{what} must be a text")
        if node.tag != _TEXT_TAG:  # null, yes, 3.5 and the like, which YAML reads as other types
            raise self.fail(node, f"{what} must be a text: put {node.value} in quotes")
        return str(node.value)

    def texts(self, node: yaml.Node | None, what: str) -> tuple[str, ...]:
        if node is None:
            return ()
        if not isinstance(node, yaml.SequenceNode):
            raise self.fail(node, f"{what} must be a list")
        return tuple(self.text(item, what) for item in node.value)

    def matrix(self, root: yaml.Node | None) -> Matrix:
        top = self.mapping(root, _TOP, "the file")
        if "backends" not in top or not isinstance(top["backends"], yaml.SequenceNode):
            raise self.fail(root, "backends must be a list of backends")
        rows: dict[str, BackendRow] = {}
        for node in top["backends"].value:
            row = self.row(node)
            if row.name in rows:
                raise self.fail(
                    node, f"backend {row.name!r} stands twice (first in line {rows[row.name].line})"
                )
            rows[row.name] = row
        select = self.texts(top.get("select"), "select")
        for position, name in enumerate(select):
            node = top["select"].value[position]
            if name not in rows:
                raise self.fail(node, f"select names {name!r}, which is no backend")
            if name in select[:position]:
                raise self.fail(node, f"select names {name!r} twice")
        pools = self.plain(top["pools"]) if "pools" in top else []
        if not isinstance(pools, list):
            raise self.fail(top["pools"], "pools must be a list")
        return Matrix(self.path, tuple(rows.values()), select, tuple(pools))

    def plain(self, node: yaml.Node) -> Any:
        """The node as lists, dicts and scalars."""
        try:
            return yaml.SafeLoader("").construct_document(node)
        except yaml.YAMLError as error:
            raise self.fail(node, str(getattr(error, "problem", error))) from error

    def part(self, fields: dict[str, yaml.Node], key: str, status: str) -> str:
        """The name of a part; one that a row claims to work has to exist."""
        name, axis = self.text(fields[key], key), _AXES[key]
        if status != "unsupported" and name not in part_names(axis):
            known = ", ".join(part_names(axis))
            raise self.fail(
                fields[key], f"a backend that is {status} needs {key} {name!r} (known: {known})"
            )
        return name

    def row(self, node: yaml.Node) -> BackendRow:
        fields = self.mapping(node, _ROW, "a backend")
        for name in ("name", "device", "kernels", "graph", "dtypes", "status"):
            if name not in fields:
                raise self.fail(node, f"a backend needs {name!r}")
        match = self.mapping(fields["match"], _MATCH, "match") if "match" in fields else {}
        status = self.text(fields["status"], "status")
        if status not in STATUSES:
            raise self.fail(fields["status"], f"status must be one of {', '.join(STATUSES)}")
        evidence = None
        if "evidence" in fields:
            evidence = self.path.resolve().parent / self.text(fields["evidence"], "evidence")
            if not evidence.is_file():
                raise self.fail(
                    fields["evidence"], f"the evidence {fields['evidence'].value} does not exist"
                )
        if status == "verified" and evidence is None:
            raise self.fail(fields["status"], "a verified backend needs evidence")
        dtypes = self.dtypes(fields["dtypes"])
        return BackendRow(
            name=self.text(fields["name"], "name"),
            device=self.part(fields, "device", status),
            kernels=self.part(fields, "kernels", status),
            graph=self.part(fields, "graph", status),
            dtypes=dtypes,
            kv_dtypes=self.dtypes(fields["kv_dtypes"]) if "kv_dtypes" in fields else dtypes,
            status=status,
            role=self.text(fields["role"], "role") if "role" in fields else "",
            quantisation=self.texts(fields.get("quantisation"), "quantisation"),
            vendors=self.texts(match.get("vendor"), "vendor"),
            archs=self.texts(match.get("arch"), "arch"),
            evidence=evidence,
            note=self.text(fields["note"], "note") if "note" in fields else "",
            cost_per_hour=self.cost(fields["cost_per_hour"]) if "cost_per_hour" in fields else None,
            line=node.start_mark.line + 1,
        )

    def cost(self, node: yaml.Node) -> float:
        value = self.plain(node)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise self.fail(node, "cost_per_hour must be a number greater than 0")
        return float(value)

    def dtypes(self, node: yaml.Node) -> tuple[DType, ...]:
        names = self.texts(node, "dtypes")
        for name in names:
            if name not in get_args(DType):
                raise self.fail(node, f"unknown dtype {name!r}")
        return names  # type: ignore[return-value]
