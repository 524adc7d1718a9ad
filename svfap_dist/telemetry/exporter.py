"""The Prometheus endpoint of one rank: values are set at log steps, an HTTP thread serves them.

One registry per rank, never the process-wide default, so that a restarted or second run in the same
process starts without old series; they end when the rank does. The counters of `storage` are read
when Prometheus scrapes, so they cost a step nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily

from svfap_dist import storage
from svfap_dist.config import MetricsConfig
from svfap_dist.errors import ClusterError
from svfap_dist.telemetry import metrics as table
from svfap_dist.telemetry.metrics import Metric

_COUNTED_BY_STORAGE = (table.STORAGE_REQUESTS, table.STORAGE_BYTES, table.STORAGE_RETRIES)


class _StorageCounters(prometheus_client.registry.Collector):
    """Requests since it was made, zeros included: `increase()` needs a value before the first."""

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


class Exporter:
    """Serves /metrics until `close`; `address` is "host:port", or "" if it is not enabled.

    Args:
        metrics: The recipe's section. The port is `port` + local_rank, or any free one if it is 0.
        run: Name of the run.
        rank: Number of this rank.
        local_rank: Its number on this host.

    Raises:
        ClusterError: If the port is in use or the host is not this one.
    """

    def __init__(self, metrics: MetricsConfig, run: str, rank: int, local_rank: int) -> None:
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
        for metric in table.PROMETHEUS_METRICS.values():  # for the first failure to be an increase
            if metric.is_counter and not metric.labels:
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

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge.

        Args:
            metric: Row of the table.
            value: In its unit.
            **labels: Values of its own labels.
        """
        self._series[metric.name].labels(**self._common, **labels).set(value)

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        """Increase a counter.

        Args:
            metric: Row of the table.
            amount: In its unit.
            **labels: Values of its own labels.
        """
        self._series[metric.name].labels(**self._common, **labels).inc(amount)

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
