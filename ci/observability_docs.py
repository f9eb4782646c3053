"""Writes docs/observability.md: the metrics come from runtime/metrics/catalogue.py.

PYTHONPATH=pkg python ci/observability_docs.py          write it
PYTHONPATH=pkg python ci/observability_docs.py --check  exit status 1 if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from halyard.runtime.metrics.catalogue import METRICS, MetricSpec
from halyard.runtime.metrics.metrics import MAX_MODELS
from halyard.runtime.metrics.requests import MAX_TENANTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "observability.md"
INTRO = f"""\
# Metrics, traces, logs, dashboards

Made by `PYTHONPATH=pkg python ci/observability_docs.py`; a test checks that it is up to date.

## Dashboard and alerts

- `deploy/grafana/halyard.json`: import it into Grafana and choose a Prometheus data source.
- `deploy/prometheus/alerts.yaml`: for Prometheus' `rule_files`; thresholds are starting points.
  `promtool test rules deploy/prometheus/alerts_test.yaml` shows them firing.
- `deploy/kubernetes`: manifests with probes, autoscaling on queue depth and the 95th percentile of
  the time to first token, a ServiceMonitor and the same alerts. [Below](#kubernetes).

Tests check that every series and label they use is one that `/metrics` exports.

The page at `/` shows the same live: requests, KV blocks, throughput, latency, the plan.

## Logs

Lines go to standard error; `--log-format json` makes each a JSON object with `time`, `level`,
`logger`, `message` and, where a request is at hand, `request_id` (X-Request-Id: the client's own or
a new one), `tenant` and `trace_id`. `--access-log` adds a line a request with `method`, `path`
(without the query string), `status`, `seconds` and `client`. Prompts and answers are never logged.

## Traces

`pip install "halyard[otel]"`, then `--otlp-endpoint http://collector:4318` or
`OTEL_EXPORTER_OTLP_ENDPOINT`; OpenTelemetry's other `OTEL_*` variables hold too. Spans go out in the
background as OTLP over HTTP. A `traceparent` header of the client is taken over, and so is its
sampling decision.

    POST /v1/chat/completions      halyard.request_id, halyard.tenant, gen_ai.request.model, http.*
      queue                        from arrival to the first step that worked on it
      prefill                      from there to the first token
      decode                       to the last token; gen_ai.usage.*, gen_ai.response.finish_reasons

One queue, prefill and decode for each prompt of a request. Without an endpoint nothing of it is
imported.

## Metrics

`GET /metrics`, Prometheus' text format. Every `halyard_` series carries `model` and `backend`.
Label values stay few: the first {MAX_TENANTS} tenants have their own, later ones share `other`; so do error
types after the 64th. Totals of engines that are gone are part of the sum: a restart, a reload or
sleep takes nothing back. After a reload to a model of another name the counters and histograms of
the one before stay, under its own name: its engine still finishes what it has. The last {MAX_MODELS} models
are shown. Gauges, and the counts of restarts and failed loads, are the serving model's.

With `--metrics-compat vllm` the numbers appear under vLLM's names too, labelled `model_name` and
`engine`, so that its dashboards and autoscalers work. The column on the right says which.

Process metrics (`process_cpu_seconds_total`, `process_resident_memory_bytes`, ...) are those of the
server's process.
"""
GROUPS = (
    ("Requests", "requests"),
    ("Queues", "requests_running"),
    ("KV memory", "kv_usage_ratio"),
    ("Steps", "prompt_tokens"),
    ("The server", "ready"),
)
KUBERNETES = """\
## Kubernetes

    kubectl apply -k deploy/kubernetes/overlays/cpu        # or overlays/cuda

`base/` is a Deployment, Service, volumes, PodDisruptionBudget and NetworkPolicy; `components/` are
`autoscaling`, `monitoring`, `prewarm` (a job that fills the cache of compiled programs before the
servers start) and `cuda`. The model is the ConfigMap's `MODEL`; images come from `deploy/Dockerfile`.

- A pod is ready when `/ready` says so; it loses traffic while its engine restarts or drains, and is
  restarted only when `/health` fails.
- The startup probe allows 30 minutes, for downloads and a first compilation. The cache volume is
  shared, so later pods start in seconds.
- At SIGTERM running requests get 60 of the 90 seconds of grace.
- The autoscaler needs prometheus-adapter with `components/autoscaling/prometheus-adapter.yaml`.
- Once there are API keys, `/metrics` asks for one: see `components/monitoring/servicemonitor.yaml`.

Checked here: schemas of all built-in kinds, `kustomize build`, the arguments against the command's
own parser, hadolint, promtool. Not run here: `docker build` and a cluster.
"""


def row(spec: MetricSpec) -> str:
    name = spec.samples[0] if spec.kind != "histogram" else f"halyard_{spec.name}"
    labels = ", ".join(spec.labels) or " "
    vllm = ""
    if spec.vllm:
        vllm = f"`vllm:{spec.vllm}{'_total' if spec.kind == 'counter' else ''}`"
    return f"| `{name}` | {spec.kind} | {labels} | {spec.text} | {vllm} |"


def page() -> str:
    parts = [INTRO]
    starts = {first: title for title, first in GROUPS}
    table: list[str] = []
    for spec in METRICS:
        if spec.name in starts:
            if table:
                parts.append("\n".join(table) + "\n")
            table = [f"### {starts[spec.name]}\n", "| metric | kind | labels | meaning | vLLM |",
                     "|---|---|---|---|---|"]  # fmt: skip
        table.append(row(spec))
    parts.append("\n".join(table) + "\n")
    return "\n".join([*parts, KUBERNETES])


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    print(
        "docs/observability.md is out of date: run PYTHONPATH=pkg python ci/observability_docs.py"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
