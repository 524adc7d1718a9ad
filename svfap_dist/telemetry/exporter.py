"""The Prometheus endpoint of one rank: numbers are put in at log steps, an HTTP thread serves them.

One registry per rank, never the process-wide default, so that a restarted or second run in the same
process starts without old series; they end when the rank does. What `storage` counts is read when
somebody scrapes, so that it costs a step nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import prometheus_client
from prometheus_client.core import CounterMetricFamily

from svfap_dist import storage
from svfap_dist.config import MetricsConfig
from svfap_dist.errors import ClusterError
from svfap_dist.telemetry import metrics as names

_COUNTED_BY_STORAGE = (names.STORAGE_REQUESTS, names.STORAGE_BYTES, names.STORAGE_RETRIES)


class _Storage(prometheus_client.registry.Collector):
    """Gives what was asked of stores since it was made, zeros included: or the first failure would
    be no increase."""

    def __init__(self, common: dict[str, str]) -> None:
        self._common, self._before = common, storage.request_counts()

    def collect(self) -> Iterable[CounterMetricFamily]:
        now, before = storage.request_counts(), self._before
        requests = _family(names.STORAGE_REQUESTS)
        for pair in ((o, outcome) for o in storage.OPERATIONS for outcome in storage.OUTCOMES):
            amount = now.requests.get(pair, 0) - before.requests.get(pair, 0)
            requests.add_metric([*self._common.values(), *pair], amount)
        yield requests
        for metric, asked, counted, earlier in (
            (names.STORAGE_BYTES, (storage.READ, storage.WRITE), now.bytes, before.bytes),
            (names.STORAGE_RETRIES, storage.OPERATIONS, now.retries, before.retries),
        ):
            family = _family(metric)
            for operation in asked:
                amount = counted.get(operation, 0) - earlier.get(operation, 0)
                family.add_metric([*self._common.values(), operation], amount)
            yield family


def _family(metric: names.Metric) -> CounterMetricFamily:
    labels = (*names.COMMON_LABELS, *metric.labels)
    return CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=labels)


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
            if metric not in _COUNTED_BY_STORAGE
        }
        registry.register(_Storage(self._common))
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
