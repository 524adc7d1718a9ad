from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from svfap_dist import storage
from svfap_dist.config import MetricsConfig
from svfap_dist.distributed import free_port
from svfap_dist.errors import ClusterError
from svfap_dist.telemetry import metrics
from svfap_dist.telemetry.exporter import Discovery, Exporter


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter(MetricsConfig(), run="r", rank=3, local_rank=1)
    yield made
    made.close()


def scrape(exporter: Exporter) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_numbers_put_in_come_out(exporter: Exporter) -> None:
    exporter.set(metrics.LOSS, 0.5)
    exporter.set(metrics.LOSS, 0.25)
    exporter.add(metrics.CLIPS, 4)
    exporter.add(metrics.CLIPS, 4)
    exporter.add(metrics.BAD_SAMPLES, 1, reason="too_short")
    found = scrape(exporter)
    assert {series: value for series, value in found.items() if value} == {
        'svfap_loss{rank="3",run="r"}': 0.25,
        'svfap_clips_total{rank="3",run="r"}': 8.0,
        'svfap_bad_samples_total{rank="3",reason="too_short",run="r"}': 1.0,
    }
    untouched = {series.partition("{")[0] for series, value in found.items() if not value}
    table = metrics.PROMETHEUS_METRICS.values()
    plain = {m.name for m in table if m.is_counter and not m.labels}
    of_storage = {m.name for m in table if m.name.startswith("svfap_storage_")}
    assert untouched == (plain - {"svfap_clips_total"}) | of_storage


def test_what_is_asked_of_stores_is_served(exporter: Exporter, tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"12345")
    for _ in range(2):
        with pytest.raises(storage.StorageMissingError):
            storage.read_bytes(str(tmp_path / "y"))
    assert {series: value for series, value in scrape(exporter).items() if value} == {
        'svfap_storage_requests_total{operation="write",outcome="ok",rank="3",run="r"}': 1.0,
        'svfap_storage_requests_total{operation="read",outcome="missing",rank="3",run="r"}': 2.0,
        'svfap_storage_bytes_total{operation="write",rank="3",run="r"}': 5.0,
    }


def test_ports_of_a_node_follow_each_other_and_are_freed() -> None:
    port = free_port() - 1
    for _ in range(2):
        exporter = Exporter(MetricsConfig(port=port), run="r", rank=9, local_rank=1)
        assert exporter.address == f"127.0.0.1:{port + 1}"
        exporter.close()


def test_a_port_in_use_is_an_error_with_advice(exporter: Exporter) -> None:
    port = int(exporter.address.rpartition(":")[2])
    with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port}.*metrics\.port"):
        Exporter(MetricsConfig(port=port), run="r", rank=0, local_rank=0)


def test_nothing_is_served_when_switched_off() -> None:
    exporter = Exporter(MetricsConfig(enabled=False), run="r", rank=0, local_rank=0)
    exporter.set(metrics.LOSS, 1.0)
    assert exporter.address == ""
    exporter.close()


def test_declarations_follow_the_conventions() -> None:
    for metric in metrics.PROMETHEUS_METRICS.values():
        assert metric.name.startswith("svfap_")
        assert metric.help.endswith(".")
        assert not metric.column or not metric.labels


def test_the_list_is_that_of_the_live_ranks() -> None:
    with Discovery(MetricsConfig(), run="r") as discovery:
        url = f"http://{discovery.address}/sd"

        def listed() -> object:
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.headers["Content-Type"] == "application/json"
                return json.load(answer)

        assert listed() == []
        discovery.show(["127.0.0.1:1", "127.0.0.1:2"])
        assert listed() == [{"targets": ["127.0.0.1:1", "127.0.0.1:2"], "labels": {"run": "r"}}]
        discovery.show([])
        assert listed() == []
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url.removesuffix("sd"), timeout=10)


def test_a_discovery_port_in_use_is_an_error_with_advice() -> None:
    with Discovery(MetricsConfig(), run="r") as discovery:
        port = int(discovery.address.rpartition(":")[2])
        with pytest.raises(ClusterError, match=r"metrics\.discovery_port"):
            Discovery(MetricsConfig(discovery_port=port), run="s")


def test_no_list_is_served_when_switched_off() -> None:
    assert Discovery(MetricsConfig(enabled=False), run="r").address == ""
