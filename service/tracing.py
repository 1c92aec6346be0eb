"""OpenTelemetry traces: one span per request with one child per stage. Off unless configured; extra `otel`.

Spans are made when the request is over, from the times measured anyway: nothing is traced on the way. Stages follow
each other without gaps from the arrival of the request. No span holds what a user typed.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onesearch.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_SERVER_FAULT = 500


def open_tracer(endpoint: str) -> "Tracer":
    """A tracer that sends to an OTLP/HTTP endpoint in the background. Raises ConfigError without the extra."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(f"traces: {endpoint!r} needs the extra: pip install onesearch[otel]") from error
    return Tracer(OTLPSpanExporter(endpoint=endpoint))


class Tracer:
    """Turns finished requests into spans; continues the trace of a `traceparent` header."""

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "onesearch"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("onesearch")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, traceparent: str, name: str, status: int, seconds: float, state: Mapping[str, Any]) -> None:
        """Record a request that ended now and took `seconds`; state is what its scope carried.

        traceparent: the header of that name, empty if there was none.
        """
        from opentelemetry import trace

        ended = time.time_ns()
        at = ended - int(seconds * 1e9)
        method, _, route = name.partition(" ")
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "onesearch.request_id": state["request_id"],
            "onesearch.variant": state.get("variant", ""),
        }
        parent = self._propagator.extract({"traceparent": traceparent})
        span = self._tracer.start_span(name, parent, trace.SpanKind.SERVER, attributes, start_time=at)
        inside = trace.set_span_in_context(span)
        for stage, spent in state.get("timings_ms", {}).items():
            if stage != "total":
                child = self._tracer.start_span(stage, inside, start_time=at)
                at += int(spent * 1e6)
                child.end(at)
        if status >= _SERVER_FAULT:
            span.set_status(trace.StatusCode.ERROR)
        span.end(ended)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
