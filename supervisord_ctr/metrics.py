"""Prometheus metrics: calls by method and status, their duration, and what the daemon holds.

Owns names, labels and the HTTP endpoint. Imported only when an address is configured, so that a
daemon without metrics does not pay for the library.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from supervisord_ctr.errors import InvalidArgument, Unavailable

#: Upper bounds of the duration histogram, in seconds.
BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0)


class Metrics:
    """`/metrics` on HOST:PORT.

    `supervisord_ctr_grpc_calls_total{method,code}`, `supervisord_ctr_grpc_seconds{method}` and one gauge for
    each entry of `gauges`, which are read at each scrape.
    """

    def __init__(self, address: str, gauges: Mapping[str, Callable[[], float]] | None = None) -> None:
        self._address = address
        self._registry = CollectorRegistry()
        self._calls = Counter("supervisord_ctr_grpc_calls", "gRPC calls that ended", ["method", "code"],
                              registry=self._registry)
        self._seconds = Histogram("supervisord_ctr_grpc_seconds", "duration of unary gRPC calls", ["method"],
                                  buckets=BUCKETS, registry=self._registry)
        for name, read in (gauges or {}).items():
            gauge = Gauge(f"supervisord_ctr_{name}", name.replace("_", " "), registry=self._registry)
            gauge.set_function(read)
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def observe(self, method: str, code: str, seconds: float | None) -> None:
        """One call of `method` ended with status `code`; `seconds` is None for streams."""
        self._calls.labels(method, code).inc()
        if seconds is not None:
            self._seconds.labels(method).observe(seconds)

    async def start(self) -> None:
        """Listen.

        Raises `InvalidArgument` for an address that is not HOST:PORT, `Unavailable` for one that is taken.
        """
        host, _, port = self._address.rpartition(":")
        if not port.isdigit():
            raise InvalidArgument(f"metrics.address {self._address!r} must be HOST:PORT")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), self._registry)
        except OSError as error:
            raise Unavailable(f"cannot listen for metrics on {self._address}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """The port that is listened on (when 0 was asked for)."""
        return 0 if self._server is None else self._server.server_port

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None and self._thread is not None:
            await asyncio.to_thread(self._server.shutdown)
            self._server.server_close()
            await asyncio.to_thread(self._thread.join)
            self._server = self._thread = None
