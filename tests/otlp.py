"""An OpenTelemetry collector that listens: what tracers of any process send it, as they would a real one."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PROTOCOL = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")  # that it speaks; a sender's environment


class Collector:
    """An OTLP endpoint on this machine."""

    def __init__(self) -> None:
        received: list[tuple[Any, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                for sent in request.resource_spans:
                    received.extend((sent.resource, span) for scope in sent.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def spans(self, name: str) -> list[tuple[Any, dict[str, Any]]]:
        """What has come under this name, each with its attributes and those of the process that made it."""
        found = [(sent, span) for sent, span in list(self._received) if span.name == name]
        return [(span, _values(sent.attributes) | _values(span.attributes)) for sent, span in found]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
