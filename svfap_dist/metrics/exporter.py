"""The Prometheus endpoint of one rank: numbers are put in at log steps, an HTTP thread serves them.

One registry per rank, never the process-wide default, so that a restarted or second run in the same
process starts without old series; they end when the rank does.
"""

from __future__ import annotations

import prometheus_client

from svfap_dist.config import MetricsConfig
from svfap_dist.errors import ClusterError
from svfap_dist.metrics import names


class Exporter:
    """Serves /metrics until `close`.

    The port is `metrics.port` + local_rank, or any free one if that is 0; `address` is "host:port",
    or "" where `metrics.enabled` is off.

    Raises: ClusterError if the port is in use or the host is not ours.
    """

    def __init__(self, metrics: MetricsConfig, run: str, rank: int, local_rank: int) -> None:
        prometheus_client.disable_created_metrics()
        registry = prometheus_client.CollectorRegistry()
        kinds = {"gauge": prometheus_client.Gauge, "counter": prometheus_client.Counter}
        self._common = {"run": run, "rank": str(rank)}
        self._series = {
            metric.name: kinds[metric.kind](
                metric.name,
                metric.help,
                labelnames=(*names.COMMON_LABELS, *metric.labels),
                registry=registry,
            )
            for metric in names.METRICS
        }
        for metric in names.METRICS:  # or the first failure would be no increase
            if metric.kind == "counter" and not metric.labels:
                self.add(metric, 0)
        self._server = None
        self.address = ""
        if metrics.enabled:
            port = metrics.port + local_rank if metrics.port else 0
            self._serve(metrics.host, port, registry)

    def _serve(self, host: str, port: int, registry: prometheus_client.CollectorRegistry) -> None:
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host, registry)
        except OSError as error:
            raise ClusterError(
                "Cannot serve metrics",
                where=f"{host}:{port}",
                found=error.strerror or str(error),
                do="choose another metrics.port, or metrics.port=0 for any free one, or "
                "metrics.enabled=false",
            ) from error
        self.address = f"{host}:{self._server.server_port}"

    def set(self, metric: names.Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._series[metric.name].labels(**self._common, **labels).set(value)

    def add(self, metric: names.Metric, amount: float, **labels: str) -> None:
        """Raise a counter."""
        self._series[metric.name].labels(**self._common, **labels).inc(amount)

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
