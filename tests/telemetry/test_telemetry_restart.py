"""The clock of a rank's start, and the restarts in a run's events."""

from __future__ import annotations

from typing import Any

import pytest

from svfap_dist.telemetry import restart


def test_clock_adds_laps_to_the_phases_before_it(monkeypatch):
    now = iter([10.0, 10.5, 12.0, 13.0])
    monkeypatch.setattr(restart.time, "perf_counter", lambda: next(now))
    done: list[bool] = []
    clock = restart.StartClock.__new__(restart.StartClock)
    clock.begin({"noticed": 0.25}, lambda: done.append(clock.is_running))
    clock.lap("engine")
    clock.lap("data")
    clock.lap("data")
    assert clock.is_running
    assert clock.finish() == {"noticed": 0.25, "engine": 0.5, "data": 2.5}
    assert done == [False]  # called once, when the first step counts as done


def test_restarts_are_later_attempts_that_reached_a_step():
    seconds = {"noticed": 0.5, "group": 1.0, "step": 0.25}

    def event(kind: str, time: float, **fields: Any) -> dict[str, Any]:
        return {"event": kind, "time": time, **fields}

    events = [
        event("start", 1.0, attempt=1, step=0),
        event("first_step", 2.0, step=1, seconds={"step": 9.0}),  # no restart
        event("resume", 5.0, attempt=2, step=20),  # died before its first step
        event("resume", 9.0, attempt=3, step=20),
        event("first_step", 10.0, step=21, seconds=seconds),
        event("stop", 11.0, step=30, reason="finished"),
    ]
    (found,) = restart.restarts(events)
    assert (found.attempt, found.step, found.time) == (3, 20, 10.0)
    assert found.total == pytest.approx(1.75)
    assert set(seconds) <= set(restart.PHASES)
