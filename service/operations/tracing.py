"""Traces of predictions for OpenTelemetry, if an endpoint is set: a span for each request, and one for each of its stages.

The spans are made when the request is answered, from times that were measured anyway. Without an endpoint nothing is
imported, and a request costs one comparison.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from service.inference.pieces import Answer

log = logging.getLogger("bentoml.modepath")
NANOSECONDS = 1_000_000_000


class Tracer:
    """Sends spans over OTLP (HTTP, protobuf), in batches, from a thread of its own."""

    def __init__(self, endpoint: str):
        """Start the thread.

        Args:
            endpoint: base URL of the collector; traces go to ENDPOINT/v1/traces.

        Raises:
            ImportError: the extra `tracing` is not installed.
        """
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Not the global provider, which BentoML uses.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "modepath"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces")))
        self._tracer = self._provider.get_tracer("modepath")
        self._within, self._kind = set_span_in_context, SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()

    def predicted(
        self,
        headers: Mapping[str, str],
        attributes: dict[str, Any],
        decode_seconds: float,
        answer: Answer,
        reply_seconds: float,
    ) -> None:
        """Record a request that was answered just now.

        Args:
            headers: of the request; its `traceparent` makes the span a part of the caller's trace.
            attributes: of the span.
            decode_seconds: time from the body to an array.
            answer: how the time of the members was spent.
            reply_seconds: time from arrays to the bytes of the answer.
        """
        stages = {
            "decode": decode_seconds,
            "queue": answer.queue_seconds,
            "members": answer.members_seconds,
            "reply": reply_seconds,
        }
        end = time.time_ns()
        start = end - int(sum(stages.values()) * NANOSECONDS)
        parent = self._propagator.extract({"traceparent": headers.get("traceparent", "")})
        span = self._tracer.start_span("POST /predict", parent, self._kind, attributes, start_time=start)
        inside = self._within(span)
        for name, seconds in stages.items():
            part = self._tracer.start_span(name, inside, start_time=start)
            start += int(seconds * NANOSECONDS)
            part.end(start)
        span.end(end)

    def close(self) -> None:
        """Send what waits, and end the thread."""
        self._provider.shutdown()


def tracer(endpoint: str | None) -> Tracer | None:
    """Return a tracer, or None without an endpoint. If the library is missing, log how to install it."""
    if endpoint is None:
        return None
    try:
        return Tracer(endpoint)
    except ImportError as error:
        log.error("There are no traces: %s. Install the extra: pip install 'modepath[tracing]'.", error)
        return None
