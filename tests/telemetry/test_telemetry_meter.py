from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from svfap_dist.config import recipe
from svfap_dist.distributed import World
from svfap_dist.telemetry import events, metrics
from svfap_dist.telemetry.meter import Meter, Phases, Window, gpu_readings
from svfap_dist.telemetry.recorder import Recorder


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_holds_the_steps_since_the_last_one() -> None:
    clock = Clock()
    meter = Meter(clock)

    def slow_source() -> Iterator[float]:
        for wait in (2.0, 1.0, 0.5):
            clock.now += wait
            yield wait

    for number, _ in enumerate(meter.waiting(slow_source())):
        clock.now += 1.0  # the step itself
        meter.count_step(
            {
                metrics.CLIPS: 4,
                metrics.FETCH_SECONDS: 0.25,
                metrics.DECODE_SECONDS: 0.75,
                metrics.FETCHED_BYTES: 100,
                metrics.BATCHES_READY: 3 + number,
            }
        )
        if number == 1:
            window = meter.window()
            assert window == Window(
                2,
                {
                    "svfap_clips_total": 8,
                    "svfap_step_seconds_total": 5.0,
                    "svfap_data_wait_seconds_total": 3.0,
                    "svfap_own_seconds_total": 3.0,
                    "svfap_fetch_seconds_total": 0.5,
                    "svfap_decode_seconds_total": 1.5,
                    "svfap_fetched_bytes_total": 200,
                    "svfap_batches_ready": 3.5,
                },
            )
    last = meter.window()
    assert last.steps == 1
    assert last.values["svfap_step_seconds_total"] == 1.5
    assert last.values["svfap_data_wait_seconds_total"] == 0.5


def test_a_windowed_metric_needs_one_row(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PROMETHEUS_METRICS", dict(metrics.PROMETHEUS_METRICS))
    toy = metrics.declare("svfap_toys_total", "Toys seen.", column="toys", over_ranks="sum")
    level = metrics.declare("svfap_toy_level", "Level.", column="toy_level", over_ranks="min")
    config = recipe.from_tables({"run": {"url": str(tmp_path)}}, where="test")
    rows: list[dict[str, Any]] = []
    world = World(0, 0, 1, 1)
    with Recorder(config, world, 1, 0, rows.append, lambda found: None, (1, 1), None) as opened:
        for first in (1, 3):
            for value in (first, first + 1):
                opened.meter.count_step({toy: value, level: value})
            opened.close_window(first + 1)
        numbers = {"step": 4, "total_steps": 4, "epoch": 0, "loss": 1, "lr": 1, "grad_norm": 1}
        opened.log_step(numbers, {})
        served = opened._exporter._series[toy.name].labels(run=config.run.name, rank="0")
        assert served._value.get() == 10
    assert (rows[0]["toys"], rows[0]["toy_level"]) == (10, 1.5)


def test_a_phase_inside_another_is_no_time_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits for a slow one in the exchange must not look as slow as that."""
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        with phases.measured("backward"):
            clock.now += 1.0
            for waited in (0.25, 2.0):
                with phases.measured("exchange", inside="backward"):
                    clock.now += waited
    assert phases.take_seconds() == {"backward": 2.0, "exchange": 4.5}
    assert phases.take_seconds() == {}


@pytest.mark.parametrize("by_nsys", [False, True])
def test_parts_of_a_step_are_nvtx_ranges_under_nsys(
    monkeypatch: pytest.MonkeyPatch, by_nsys: bool
) -> None:
    named: list[str] = []

    @contextlib.contextmanager
    def nvtx_range(name: str) -> Iterator[None]:
        named.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx_range)
    monkeypatch.delenv("NSYS_PROFILING_SESSION_ID", raising=False)
    if by_nsys:
        monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    phases = Phases(torch.device("cpu"))
    with phases.range("load"), phases.measured("forward"):
        pass
    assert named == (["load", "forward"] if by_nsys else [])


def rank(host: str, metrics: str) -> dict[str, Any]:
    return {"host": host, "pid": 1, "metrics": metrics}


def test_loopback_addresses_of_other_hosts_are_not_listed(caplog: pytest.LogCaptureFixture) -> None:
    ranks = [rank("a", "127.0.0.1:9000"), rank("a", "127.0.0.1:9001"), rank("b", "127.0.0.1:9000")]
    assert events._reachable(ranks) == ["127.0.0.1:9000", "127.0.0.1:9001"]
    assert "ranks on b" in caplog.text
    assert "metrics.host=0.0.0.0" in caplog.text


def test_hosts_with_addresses_of_their_own_are_all_listed(caplog: pytest.LogCaptureFixture) -> None:
    ranks = [rank("a", "a:9000"), rank("b", "b:9000"), rank("b", "")]
    assert events._reachable(ranks) == ["a:9000", "b:9000"]
    assert not caplog.text


def test_an_error_of_nvml_costs_its_gauge_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML's errors derive from Exception only."""

    class NVMLError(Exception):
        pass

    def utilization() -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    assert gpu_readings() == {metrics.GPU_MEMORY: 5}
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 40)
    assert gpu_readings() == {metrics.GPU_MEMORY: 5, metrics.GPU_UTILIZATION: 0.4}
