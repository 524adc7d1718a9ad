"""What Prometheus reads: /metrics of each rank, and the driver's list of live ranks at /sd.

Values are set at log steps; HTTP threads serve them. Each rank has a registry of its own, never the
process-wide default, so a restarted or second run in the same process starts without old series;
they end when the rank does. The counters of `storage` are read when Prometheus scrapes, so they
cost a step nothing.

Ranks come and go with every restart and change of world size, and with `metrics.port = 0` they
listen on any free port. So one constant address, `http://HOST:PORT/sd`, lists the live ones:
https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import http.server
import json
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import MetricsHandler

from svfap_dist import storage
from svfap_dist.config import MetricsConfig
from svfap_dist.errors import ClusterError
from svfap_dist.telemetry import metrics as table
from svfap_dist.telemetry.metrics import Metric

DISCOVERY_PATH = "/sd"
_COUNTED_BY_STORAGE = (table.STORAGE_REQUESTS, table.STORAGE_BYTES, table.STORAGE_RETRIES)

log = logging.getLogger(__name__)


class _Server:
    """An HTTP server in a thread; a context manager. `address` is "host:port", or "" if closed."""

    def __init__(self) -> None:
        self._server: http.server.ThreadingHTTPServer | None = None
        self.address = ""

    def _start(
        self, handler: type[http.server.BaseHTTPRequestHandler], host: str, key: str, port: int
    ) -> None:
        try:
            self._server = http.server.ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            do = f"choose another {key}, or {key}=0 for any free one, or metrics.enabled=false"
            found = error.strerror or str(error)
            raise ClusterError("Cannot serve metrics", f"{host}:{port}", found, do) from error
        self.address = f"{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class Discovery(_Server):
    """Serves the list of live ranks, if `metrics.enabled` is on.

    Args:
        metrics: The recipe's section.
        run: Name of the run.

    Raises:
        ClusterError: If the port is in use or the host is not this one.
    """

    def __init__(self, metrics: MetricsConfig, run: str) -> None:
        super().__init__()
        self._run, self._answer = run, b"[]"
        if metrics.enabled:
            port = metrics.discovery_port
            self._start(self._handler(), metrics.host, "metrics.discovery_port", port)
            log.info("Prometheus finds the ranks at http://%s%s", self.address, DISCOVERY_PATH)

    def show(self, addresses: Sequence[str]) -> None:
        """Replace the list.

        Args:
            addresses: "host:port" of each live rank.
        """
        groups = [{"targets": list(addresses), "labels": {"run": self._run}}] if addresses else []
        self._answer = json.dumps(groups).encode()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        discovery = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == DISCOVERY_PATH
                answer = discovery._answer if found else b""
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        return Handler


class Exporter(_Server):
    """Serves /metrics of one rank, if `metrics.enabled` is on.

    Args:
        metrics: The recipe's section. The port is `port` + local_rank, or any free one if it is 0.
        run: Name of the run.
        rank: Number of this rank.
        local_rank: Its number on this host.

    Raises:
        ClusterError: If the port is in use or the host is not this one.
    """

    def __init__(self, metrics: MetricsConfig, run: str, rank: int, local_rank: int) -> None:
        super().__init__()
        prometheus_client.disable_created_metrics()
        registry = prometheus_client.CollectorRegistry()
        self._common = {"run": run, "rank": str(rank)}
        kinds: dict[bool, Any] = {True: prometheus_client.Counter, False: prometheus_client.Gauge}
        self._series = {
            metric.name: kinds[metric.is_counter](
                metric.name,
                metric.help,
                labelnames=(*table.COMMON_LABELS, *metric.labels),
                registry=registry,
            )
            for metric in table.PROMETHEUS_METRICS.values()
            if metric not in _COUNTED_BY_STORAGE
        }
        registry.register(_StorageCounters(self._common))
        for metric in table.PROMETHEUS_METRICS.values():
            if metric.is_counter and not metric.labels:
                self.add(metric, 0)  # so that the first failure is an increase
        if metrics.enabled:
            port = metrics.port + local_rank if metrics.port else 0
            self._start(MetricsHandler.factory(registry), metrics.host, "metrics.port", port)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge.

        Args:
            metric: Row of the table.
            value: Value in its unit.
            **labels: Values of its own labels.
        """
        self._series[metric.name].labels(**self._common, **labels).set(value)

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        """Increase a counter.

        Args:
            metric: Row of the table.
            amount: Increase in its unit.
            **labels: Values of its own labels.
        """
        self._series[metric.name].labels(**self._common, **labels).inc(amount)


class _StorageCounters(prometheus_client.registry.Collector):
    """Requests since it was made, zeros included, so that the first failure is an increase."""

    def __init__(self, common: dict[str, str]) -> None:
        self._common, self._before = common, storage.request_counts()

    def collect(self) -> Iterable[CounterMetricFamily]:
        now, before = storage.request_counts(), self._before
        requests = _family(table.STORAGE_REQUESTS)
        for pair in ((o, outcome) for o in storage.OPERATIONS for outcome in storage.OUTCOMES):
            amount = now.requests.get(pair, 0) - before.requests.get(pair, 0)
            requests.add_metric([*self._common.values(), *pair], amount)
        yield requests
        for metric, operations, counted, earlier in (
            (table.STORAGE_BYTES, (storage.READ, storage.WRITE), now.bytes, before.bytes),
            (table.STORAGE_RETRIES, storage.OPERATIONS, now.retries, before.retries),
        ):
            family = _family(metric)
            for operation in operations:
                amount = counted.get(operation, 0) - earlier.get(operation, 0)
                family.add_metric([*self._common.values(), operation], amount)
            yield family


def _family(metric: Metric) -> CounterMetricFamily:
    labels = (*table.COMMON_LABELS, *metric.labels)
    return CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=labels)
