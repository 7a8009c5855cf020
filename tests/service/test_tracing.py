"""Traces arrive at a collector that speaks OTLP; without an endpoint nothing is imported."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest

from tests.onnx_members import SHAPE, publish

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra `tracing` is not installed"
)
BODY = {"inputs": np.zeros((2, *SHAPE)).tolist()}


@pytest.fixture
def collector():
    """Collect spans, (address, spans)."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces"
            request = trace_service.ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                names = {one.key: one.value.string_value for one in resource.resource.attributes}
                for scope in resource.scope_spans:
                    spans.extend((names["service.name"], span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):  # noqa: A002 - the name is http.server's
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()


def test_a_request_is_a_span_of_the_callers_trace_with_a_span_for_each_stage(store, serve, collector):
    address, spans = collector
    publish(store, "animals")
    server = serve(store, MODEPATH_OTLP_ENDPOINT=address)
    server.until(200)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    began = time.time_ns()
    answer = httpx.post(server.url + "/predict", json=BODY, headers={"traceparent": f"00-{trace}-{parent}-01"}).json()
    httpx.post(server.url + "/predict", json=BODY)
    server.stop()  # sends what waits
    assert {name for name, _ in spans} == {"modepath"}
    of_trace = [span for _, span in spans if span.trace_id.hex() == trace]
    [request] = [span for span in of_trace if span.name == "POST /predict"]
    assert request.parent_span_id.hex() == parent
    values = {one.key: one.value.string_value or one.value.int_value for one in request.attributes}
    assert values == {
        "modepath.ensemble": "animals", "modepath.version": 1, "modepath.mode": "average", "modepath.rows": 2,
        "modepath.request_id": answer["request_id"],
    }  # fmt: skip
    stages = [span for span in of_trace if span.parent_span_id == request.span_id]
    assert [span.name for span in sorted(stages, key=lambda span: span.start_time_unix_nano)] == [
        "decode", "queue", "members", "reply",
    ]  # fmt: skip
    assert began - 10**9 < request.start_time_unix_nano <= min(span.start_time_unix_nano for span in stages)
    assert max(span.end_time_unix_nano for span in stages) <= request.end_time_unix_nano + 10**6
    assert len({span.trace_id for _, span in spans}) == 2  # the other one began a trace of its own


def test_a_collector_that_is_away_costs_no_answer(store, serve):
    publish(store, "animals")
    server = serve(store, MODEPATH_OTLP_ENDPOINT="http://127.0.0.1:9")
    server.until(200)
    assert [httpx.post(server.url + "/predict", json=BODY).status_code for _ in range(20)] == [200] * 20


def test_without_an_endpoint_the_exporter_is_not_imported():
    code = "import sys, service.worker; sys.exit(any('otlp' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
