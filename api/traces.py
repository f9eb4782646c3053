"""OpenTelemetry spans: an HTTP request, and below it how its prompts queued, were read and answered.

    POST /v1/chat/completions      server span; its parent is the client's traceparent, if it sent one
      queue                        from arrival to the first step
      prefill                      from there to the first token
      decode                       from there to the last token

Nothing of this is imported or called unless an endpoint is set.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from halyard import __version__
from halyard.api.context import RequestContext, current
from halyard.hal.errors import ConfigError
from halyard.runtime.metrics.requests import RequestTimes
from halyard.runtime.request import Request

__all__ = ["Traces", "open_traces"]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
INSTALL = 'pip install "halyard[otel]"'
_MAX_WATCHED = 100_000  # requests whose end was not seen: a bound, should ends get lost


@dataclass(frozen=True, slots=True)
class _Watched:
    """A prompt whose end makes spans."""

    span: Any  # its HTTP request's
    arrival: float  # time.monotonic()


def open_traces(endpoint: str | None) -> Traces | None:
    """Spans go to an OTLP/HTTP endpoint, e.g. http://collector:4318; None where none is set.

    The usual OTEL_* variables hold for what is not said here.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if not endpoint and not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        return Traces(endpoint)
    except ImportError as error:
        raise ConfigError(f"traces need OpenTelemetry ({error}): {INSTALL}") from None


class Traces:
    """Makes spans and sends them in the background. Belongs to the event loop's thread."""

    def __init__(self, endpoint: str | None) -> None:
        self._api = importlib.import_module("opentelemetry.trace")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        carrier = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
        self._carrier = carrier.TraceContextTextMapPropagator()
        facts = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "halyard"),
                 "service.version": __version__}  # fmt: skip
        self._provider = sdk.TracerProvider(resource=resources.Resource.create(facts))
        target = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
        exporter = otlp.OTLPSpanExporter(endpoint=target)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("halyard", __version__)
        self._watched: dict[str, _Watched] = {}

    def begin(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[bytes, bytes]],
        context: RequestContext,
    ) -> None:
        """An HTTP request has come; `end` is called when it is answered."""
        sent = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in headers
            if name.lower() in (b"traceparent", b"tracestate")
        }
        span = self._tracer.start_span(
            method,
            context=self._carrier.extract(sent),
            kind=self._api.SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "url.path": path,
                "halyard.request_id": context.request_id,
            },
        )
        context.span = span
        context.trace_id = format(span.get_span_context().trace_id, "032x")

    def end(self, context: RequestContext, route: str, status: int, whole: bool) -> None:
        """It is answered; not `whole` if the client left before the end (status 0: at once)."""
        span = context.span
        if route:
            span.update_name(f"{span.attributes['http.request.method']} {route}")
            span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        if context.tenant:
            span.set_attribute("halyard.tenant", context.tenant)
        if status >= 500 or not whole:
            span.set_status(self._api.StatusCode.ERROR, "" if whole else "the client left")
        span.end()

    def watch(self, requests: Iterable[Request], model: str) -> None:
        """These prompts belong to the HTTP request at hand; `finish` is called for each."""
        context = current.get()
        if context is None or context.span is None or not context.span.is_recording():
            return
        context.span.set_attribute("gen_ai.request.model", model)
        for request in requests:
            if len(self._watched) < _MAX_WATCHED:
                self._watched[request.request_id] = _Watched(context.span, request.arrival_time)

    def finish(
        self, request: Request, times: RequestTimes | None, reasons: tuple[str, ...]
    ) -> None:
        """A prompt's answers have ended: its spans are made after the fact, from its times."""
        watched = self._watched.pop(request.request_id, None)
        if watched is None:
            return
        now = time.monotonic()
        ahead = time.time() - now  # the clocks' distance
        below = self._api.set_span_in_context(watched.span)
        facts: dict[str, Any] = {
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.output_tokens": times.tokens if times is not None else 0,
            "gen_ai.response.finish_reasons": reasons,
        }

        def span(name: str, since: float, until: float, **more: Any) -> None:
            made = self._tracer.start_span(
                name,
                context=below,
                start_time=int((since + ahead) * 1e9),
                attributes={"gen_ai.response.id": request.request_id, **more},
            )
            if "error" in reasons and until == end:
                made.set_status(self._api.StatusCode.ERROR)
            made.end(end_time=int((max(since, until) + ahead) * 1e9))

        end = times.last if times is not None else now
        if times is None:  # it ended before its first token
            span("queue", watched.arrival, end, **facts)
            return
        span("queue", times.arrival, times.started)
        span("prefill", times.started, times.first)
        span("decode", times.first, end, **facts)

    def close(self) -> None:
        """Send what is left. Takes seconds if the endpoint doesn't answer, so call it in a thread."""
        self._provider.shutdown()
