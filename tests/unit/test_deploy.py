"""What is under deploy/ fits what is exported, what the command takes and what Kubernetes knows."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from halyard.api.cli import generate, serve
from halyard.runtime.metrics.catalogue import exported_names

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
# Labels that Prometheus adds to what it scrapes.
ADDED = {"instance", "job", "namespace", "pod"}
promql = pytest.importorskip("promql_parser", reason="needs promql-parser")


def run(*command: str, cwd: Path = ROOT) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "pkg")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- PromQL ---------------------------------------------------------------------------------------


def nodes(expression: Any) -> Iterator[Any]:
    """A parsed expression and all below it."""
    yield expression
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        below = getattr(expression, name, None)
        if below is not None:
            yield from nodes(below)
    for argument in getattr(expression, "args", None) or []:
        yield from nodes(argument)


def problems(text: str) -> list[str]:
    """What an expression asks for that nobody exports."""
    exported = exported_names()
    found = []
    text = text.replace("$__rate_interval", "5m")
    labels_here: set[str] = set()
    for node in nodes(promql.parse(text)):
        if type(node).__name__ == "VectorSelector":
            if node.name not in exported:
                found.append(f"no metric {node.name}")
                continue
            labels_here |= {*exported[node.name], *ADDED}
            for name, _ in re.findall(r"(\w+)\s*(=~|!~|!=|=)", str(node.matchers)):
                if name not in labels_here:
                    found.append(f"{node.name} has no label {name}")
    for group in re.findall(r"\b(?:by|without|on)\s*\(([^)]*)\)", text):
        for name in filter(None, re.split(r"[,\s]+", group)):
            if name not in labels_here:
                found.append(f"nothing in it has the label {name}")
    return found


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "halyard.json").read_text())  # type: ignore[no-any-return]


def panel_queries() -> list[tuple[str, str, str]]:
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def alert_rules() -> list[dict[str, Any]]:
    text = (DEPLOY / "prometheus" / "alerts.yaml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def test_the_check_finds_what_is_not_exported() -> None:
    assert problems("rate(halyard_steps_total[5m])") == []
    assert problems("rate(halyard_steps[5m])") == ["no metric halyard_steps"]
    assert problems('halyard_ready{tenant="x"}') == ["halyard_ready has no label tenant"]
    assert problems("sum by (tenant) (halyard_ready)") == ["nothing in it has the label tenant"]


def test_every_panel_asks_for_what_is_exported() -> None:
    queries = panel_queries()
    assert len(queries) > 40
    for title, expression, legend in queries:
        assert problems(expression) == [], title
        for label in re.findall(r"{{(\w+)}}", legend):
            assert re.search(rf"\b{label}\b", expression), (title, label)


def test_panels_do_not_overlap_and_have_ids() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]


def test_most_metrics_are_on_the_dashboard() -> None:
    text = " ".join(expression for _, expression, _ in panel_queries())
    unseen = {name for name in exported_names()
              if name.startswith("halyard_") and not name.endswith(("_sum", "_count"))
              and name not in text and name.removesuffix("_bucket") + "_sum" not in text}  # fmt: skip
    assert unseen <= {"halyard_steps_total", "halyard_request_inference_seconds_bucket",
                      "halyard_tenant_prompt_tokens_total", "halyard_tenant_cached_tokens_total"}  # fmt: skip


def test_every_alert_asks_for_what_is_exported() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert problems(rule["expr"]) == [], rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_alerts_fire_when_they_should() -> None:
    run("promtool", "check", "rules", "alerts.yaml", cwd=DEPLOY / "prometheus")
    run("promtool", "test", "rules", "alerts_test.yaml", cwd=DEPLOY / "prometheus")


def test_what_is_generated_is_up_to_date() -> None:
    for script in ("dashboards.py", "observability_docs.py"):
        run(sys.executable, f"ci/{script}", "--check")


def test_the_autoscalers_metrics_are_made_from_exported_ones() -> None:
    rules = yaml.safe_load(
        (KUBERNETES / "components/autoscaling/prometheus-adapter.yaml").read_text()
    )
    made = set()
    for rule in (*rules["rules"]["custom"], *rules["rules"]["external"]):
        assert problems(rule["seriesQuery"]) == []
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
        assert problems(query.replace("<<.LabelMatchers>>", 'namespace="x"')) == []
        made.add(rule["name"]["as"])
    metrics = documents("components/autoscaling/hpa.yaml")[0]["spec"]["metrics"]
    assert {m[m["type"].lower()]["metric"]["name"] for m in metrics} == made


# -- Kubernetes -----------------------------------------------------------------------------------


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def manifests() -> list[Path]:
    return sorted(p for folder in ("base", "components") for p in (KUBERNETES / folder).rglob("*.yaml")
                  if p.name not in ("kustomization.yaml", "prometheus-adapter.yaml"))  # fmt: skip


def objects() -> list[dict[str, Any]]:
    return [o for path in manifests() for o in documents(str(path.relative_to(KUBERNETES)))]


def test_manifests_fit_the_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    known = 0
    for made in objects():
        if made["apiVersion"].startswith("monitoring.coreos.com/"):
            continue  # the operator's own kinds: not among Kubernetes' schemas
        validate.validate(made, "1.34", strict=True)
        known += 1
    assert known >= 8
    with pytest.raises(validate.ValidationError):
        validate.validate(
            {"apiVersion": "v1", "kind": "Service", "spec": {"prts": []}}, "1.34", strict=True
        )


def test_files_and_names_that_manifests_mention_are_there() -> None:
    for path in KUBERNETES.rglob("kustomization.yaml"):
        told = yaml.safe_load(path.read_text())
        for name in (*told.get("resources", []), *told.get("components", [])):
            assert (path.parent / name).exists(), f"{path}: {name}"
    listed = {
        (path.parent / name).resolve()
        for path in KUBERNETES.rglob("kustomization.yaml")
        for name in yaml.safe_load(path.read_text()).get("resources", [])
    }
    assert {path.resolve() for path in manifests()} <= listed
    claims = {o["metadata"]["name"] for o in objects() if o["kind"] == "PersistentVolumeClaim"}
    label = {"app.kubernetes.io/name": "halyard"}
    for made in objects():
        if made["kind"] in ("Deployment", "Job"):
            pod = made["spec"]["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            used = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]
                    if "persistentVolumeClaim" in v}  # fmt: skip
            assert used <= claims
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        selector = made["spec"].get("selector", {}) if "spec" in made else {}
        if made["kind"] in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
            assert selector["matchLabels"] == label
        if made["kind"] == "Service":
            assert selector == label


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    {"serve": serve, "generate": generate}[command].add_arguments(parser)
    return parser


def test_arguments_are_ones_that_the_command_takes() -> None:
    seen = set()
    for made in objects():
        if made["kind"] not in ("Deployment", "Job"):
            continue
        (container,) = made["spec"]["template"]["spec"]["containers"]
        command, *arguments = container["args"]
        parser_of(command).parse_args(arguments)
        seen.add(command)
    assert seen == {"serve", "generate"}


def test_probes_ask_for_routes_that_are_there() -> None:
    (deployment,) = (o for o in objects() if o["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"]
             for kind in ("startup", "readiness", "liveness")}  # fmt: skip
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    options = parser_of("serve").parse_args(container["args"][1:])
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + options.grace_seconds < pod["terminationGracePeriodSeconds"]
    assert container["ports"][0]["containerPort"] == options.port


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("overlay", ["cpu", "cuda"])
def test_overlays_build(overlay: str) -> None:
    built = list(
        yaml.safe_load_all(run("kubectl", "kustomize", f"{KUBERNETES}/overlays/{overlay}"))
    )
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for made in built:
        if not made["apiVersion"].startswith("monitoring.coreos.com/"):
            validate.validate(made, "1.34", strict=True)
    (deployment,) = (o for o in built if o["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"halyard:{overlay}"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay == "cuda")


# -- the image ------------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word
    ]


def test_the_image_runs_as_nobody_and_serves() -> None:
    last = dict(dockerfile())
    assert last["USER"] == "10001:10001"
    command, *arguments = json.loads(last["CMD"])
    assert (json.loads(last["ENTRYPOINT"]), command) == (["halyard"], "serve")
    options = parser_of("serve").parse_args(arguments)
    assert options.host == "0.0.0.0"
    assert last["EXPOSE"] == str(options.port)
    assert f":{options.port}/health" in last["HEALTHCHECK"]
    compile(json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2], "HEALTHCHECK", "exec")
    assert sum(word == "FROM" for word, _ in dockerfile()) == 2


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_hadolint_has_nothing_to_say() -> None:
    run("hadolint", "deploy/Dockerfile")


def test_what_the_build_needs_is_in_its_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = ("pyproject.toml", "README.md", "LICENSE", "pkg", "hw_matrix.yaml", "api", "compiler",
              "hal", "models", "runtime")  # fmt: skip
    assert all((ROOT / name).exists() and name not in ignored for name in needed)
