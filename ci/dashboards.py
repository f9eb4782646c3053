"""Writes Grafana's dashboard from the list of panels below, and the alert rules as a Kubernetes object.

python ci/dashboards.py          write it
python ci/dashboards.py --check  exit status 1 if it is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "halyard.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
RULES = DEPLOY / "kubernetes" / "components" / "monitoring" / "rules.yaml"
WHERE = 'model=~"$model",backend=~"$backend"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
Query = tuple[str, str]  # PromQL, legend


def rate(name: str, by: str = "", extra: str = "") -> str:
    """Per second, summed over instances."""
    where = f"{WHERE},{extra}" if extra else WHERE
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate(halyard_{name}{{{where}}}[$__rate_interval]))"


def gauge(name: str, how: str = "sum") -> str:
    return f"{how} (halyard_{name}{{{WHERE}}})"


def quantiles(name: str, *wanted: float) -> list[Query]:
    return [
        (f"histogram_quantile({q:g}, {rate(f'{name}_bucket', 'le')})", f"p{q * 100:g}")
        for q in wanted
    ]


def mean(name: str) -> str:
    return f"{rate(f'{name}_sum')} / {rate(f'{name}_count')}"


SPREAD = (0.5, 0.95, 0.99)
TTFT = "time_to_first_token_seconds"
# (row, [(title, unit, width of 24, kind, queries, what it tells)])
Panel = tuple[str, str, int, str, list[Query], str]
ROWS: list[tuple[str, list[Panel]]] = [
    ("Now", [
        ("Servers ready", "none", 3, "stat", [(gauge("ready"), "")], "Instances that answer."),
        ("Running", "none", 3, "stat", [(gauge("requests_running"), "")], "Sequences that run."),
        ("Waiting", "none", 3, "stat",
         [(f"{gauge('requests_waiting')} + {gauge('requests_swapped')}", "")],
         "Requests that wait, and sequences in the host tier."),
        ("Tokens/s", "none", 4, "stat", [(rate("generation_tokens_total"), "")], "Generated."),
        ("KV fullness", "percentunit", 4, "stat", [(gauge("kv_usage_ratio", "max"), "")],
         "The fullest instance."),
        ("TTFT p95", "s", 4, "stat",
         [(f"histogram_quantile(0.95, {rate(f'{TTFT}_bucket', 'le')})", "")],
         "Time to first token."),
        ("Errors/s", "reqps", 3, "stat", [(rate("request_errors_total"), "")],
         "Refused or failed."),
    ]),
    ("Latency", [
        ("Time to first token", "s", 8, "timeseries", quantiles(TTFT, *SPREAD), ""),
        ("Between tokens", "s", 8, "timeseries",
         quantiles("inter_token_latency_seconds", *SPREAD), ""),
        ("Whole request", "s", 8, "timeseries", quantiles("request_latency_seconds", *SPREAD), ""),
        ("Queue", "s", 8, "timeseries", quantiles("request_queue_seconds", *SPREAD),
         "From arrival to the first step."),
        ("Time per output token", "s", 8, "timeseries",
         quantiles("time_per_output_token_seconds", *SPREAD), "Of finished requests."),
        ("Where the time goes", "s", 8, "bars",
         [(mean(f"request_{part}_seconds"), part) for part in ("queue", "prefill", "decode")],
         "Mean seconds of a request."),
    ]),
    ("Traffic", [
        ("Tokens/s", "none", 8, "timeseries",
         [(rate("generation_tokens_total"), "generated"),
          (rate("prompt_tokens_total"), "prompt, computed"),
          (rate("prefix_cache_hits_total"), "prompt, from the cache")], ""),
        ("Answers by how they ended", "reqps", 8, "bars",
         [(rate("requests_total", "finish_reason"), "{{finish_reason}}")], ""),
        ("Errors by type", "reqps", 8, "bars",
         [(rate("request_errors_total", "type"), "{{type}}")], ""),
        ("Prompt length", "none", 8, "timeseries", quantiles("request_prompt_tokens", *SPREAD), ""),
        ("Answer length", "none", 8, "timeseries",
         quantiles("request_generation_tokens", *SPREAD), ""),
        ("Tokens/s of one request", "none", 8, "timeseries",
         quantiles("request_tokens_per_second", 0.05, 0.5), "The slowest twentieth, and the middle."),
    ]),
    ("Tenants", [
        ("Tokens/s by tenant", "none", 8, "bars",
         [(rate("tenant_generation_tokens_total", "tenant"), "{{tenant}}")], "Generated."),
        ("TTFT p95 by tenant", "s", 8, "timeseries",
         [(f"histogram_quantile(0.95, {rate(f'{TTFT}_bucket', 'le, tenant')})", "{{tenant}}")], ""),
        ("Errors by tenant", "reqps", 8, "bars",
         [(rate("request_errors_total", "tenant"), "{{tenant}}")], ""),
    ]),
    ("KV memory", [
        ("Device blocks", "none", 8, "timeseries",
         [(gauge("kv_blocks_used"), "used"), (gauge("kv_blocks_cached"), "cached"),
          (gauge("kv_blocks_total"), "total")], ""),
        ("Host blocks", "none", 8, "timeseries",
         [(gauge("host_blocks_used"), "used"), (gauge("host_blocks_cached"), "cached"),
          (gauge("host_blocks_total"), "total")], ""),
        ("Prefix cache hit rate", "percentunit", 8, "timeseries",
         [(f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}", "hits")],
         "Share of prompt tokens found."),
        ("Preemptions and evictions", "ops", 8, "bars",
         [(rate("preemptions_total", "kind"), "preempted: {{kind}}"),
          (rate("evictions_total", "cause"), "evicted: {{cause}}")], ""),
        ("Swapped", "Bps", 8, "timeseries",
         [(rate("swap_bytes_total", "direction"), "{{direction}}")], "Between the tiers."),
        ("Share of time spent swapping", "percentunit", 8, "timeseries",
         [(rate("swap_seconds_total", "direction"), "{{direction}}")], ""),
        ("Waste and copies", "none", 8, "timeseries",
         [(gauge("kv_waste_ratio", "avg"), "share of slots without a token"),
          (rate("blocks_copied_total"), "blocks copied a second")], ""),
    ]),
    ("Engine", [
        ("Step", "s", 8, "timeseries", quantiles("step_duration_seconds", *SPREAD), ""),
        ("Steps by what they do", "percentunit", 8, "bars",
         [(rate("step_phase_seconds_total", "phase"), "{{phase}}")],
         "Seconds a second, summed over instances."),
        ("Batch", "none", 8, "timeseries",
         [(mean("step_rows"), "sequences a step"), (mean("step_tokens"), "tokens a step")],
         "Means."),
        ("Fallbacks, restarts, memory", "none", 8, "bars",
         [(f"sum by (part) (halyard_fallbacks_total{{{WHERE}}})", "{{part}}, since its engine started"),
          (f"sum (increase(halyard_engine_restarts_total{{{WHERE}}}[1h]))", "restarts"),
          (f"sum (increase(halyard_load_failures_total{{{WHERE}}}[1h]))", "failed loads"),
          (f"sum (increase(halyard_out_of_memory_steps_total{{{WHERE}}}[1h]))", "out of memory"),
          (gauge("sequences_limit", "min"), "sequences at once, at most")],
         "In the last hour; after memory ran out fewer sequences run at once."),
        ("Start by phase", "s", 8, "bars",
         [(f"max by (phase) (halyard_start_seconds{{{WHERE}}})", "{{phase}}")],
         "What the last start took."),
        ("What runs", "none", 8, "table", [(f"halyard_info{{{WHERE}}}", "")], ""),
    ]),
]  # fmt: skip


def target(query: Query, number: int, kind: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "datasource": SOURCE,
        "expr": query[0],
        "legendFormat": query[1] or "__auto",
        "refId": chr(ord("A") + number),
    }
    if kind == "table":
        made |= {"format": "table", "instant": True}
    return made


def panel(number: int, place: dict[str, int], spec: Panel) -> dict[str, Any]:
    title, unit, _, kind, queries, told = spec
    bars = kind == "bars"
    defaults: dict[str, Any] = {"unit": unit}
    if kind in ("timeseries", "bars"):
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 25 if bars else 8,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if bars else "none"},
        }
        defaults["min"] = 0
    options: dict[str, Any] = {}
    if kind == "stat":
        options = {"graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"]}}
    elif kind != "table":
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": number,
        "type": "timeseries" if bars else kind,
        "title": title,
        "description": told,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [target(query, i, kind) for i, query in enumerate(queries)],
    }


def variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, specs in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x, height = 0, 4 if specs[0][3] == "stat" else 8
        for spec in specs:
            if x + spec[2] > 24:
                x, y = 0, y + height
            place = {"x": x, "y": y, "w": spec[2], "h": height}
            panels.append(panel(len(panels) + 1, place, spec))
            x += spec[2]
        y += height
    return {
        "uid": "halyard",
        "title": "Halyard",
        "tags": ["halyard", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                },
                variable("model", "label_values(halyard_ready, model)"),
                variable("backend", 'label_values(halyard_ready{model=~"$model"}, backend)'),
            ]
        },
        "panels": panels,
    }


def rules() -> str:
    """The alert rules for the Prometheus Operator."""
    made = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "halyard"},
        "spec": yaml.safe_load(ALERTS.read_text()),
    }
    head = "# Made from deploy/prometheus/alerts.yaml by ci/dashboards.py.\n"
    return head + yaml.safe_dump(made, sort_keys=False, width=100)


def main() -> int:
    stale = []
    for file, text in ((DASHBOARD, json.dumps(dashboard(), indent=1) + "\n"), (RULES, rules())):
        if "--check" not in sys.argv[1:]:
            file.write_text(text)
        elif not file.is_file() or file.read_text() != text:
            stale.append(str(file.relative_to(ROOT)))
    if stale:
        print(f"out of date: {', '.join(stale)}: run python ci/dashboards.py")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
