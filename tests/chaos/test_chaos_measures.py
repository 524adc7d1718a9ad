"""What the suite reads from a run's events, on events written by hand."""

from __future__ import annotations

import pytest
from endurance import shares_of
from faults import AS_EXPECTED, NOT_PROMISED, Row, judge_restarts
from observed_run import Recovery, recovery_of

from svfap_dist.telemetry.goodput import Goodput


def _event(kind: str, time: float, **fields) -> dict:
    return {"event": kind, "time": time, **fields}


def _window(time: float, step: int, waited: float = 0.0) -> dict:
    seconds = {"checkpoint_seconds": 0.0, "evaluation_seconds": 0.0}
    return _event("window", time, step=step, data_wait_seconds=waited, **seconds)


_KILLED = [
    _event("start", 0.0, step=0),
    _event("ready", 2.0),
    *[_window(3.0 + step, step) for step in range(1, 6)],
    _event("stop", 9.0, step=5, reason="RuntimeError", message="a rank is lost"),
    _event("resume", 14.0, step=2),
    _event("ready", 15.0),
    *[_window(13.0 + step, step) for step in range(3, 8)],
]


def test_a_restart_ends_at_the_first_step_beyond_those_before():
    # Killed after step 5, which took until 8.0; step 6 was done at 19.0.
    assert recovery_of(_KILLED, 8.5, float("inf")) == Recovery(0.5, 10.5, 3, pause=7.5)


def test_the_phases_of_a_restart_say_when_it_was_noticed():
    seconds = {"noticed": 1.0, "group": 3.0, "imports": 2.5}
    silent = [event for event in _KILLED if event["event"] != "stop"]
    silent.insert(-4, _event("first_step", 15.0, seconds=seconds))
    assert recovery_of(silent, 8.5, float("inf")).noticed == 1.0


def test_no_restart_is_a_pause():
    steady = [_event("start", 0.0, step=0), _window(1.0, 1), _window(2.0, 2), _window(5.0, 3)]
    assert recovery_of(steady, 1.5, float("inf")) == Recovery(None, None, 0, pause=3.0)


def test_a_run_without_a_checkpoint_starts_again():
    begun = [_event("start", 0.0, step=0), _window(1.0, 1), _window(2.0, 2)]
    again = [_event("start", 5.0, step=0), *[_window(6.0 + step, step) for step in (1, 2, 3)]]
    assert recovery_of([*begun, *again], 2.5, float("inf")) == Recovery(2.5, 6.5, 2, pause=4.5)


def test_a_skipped_update_is_noticed_without_a_restart():
    skipped = [_event("start", 0.0, step=0), _window(1.0, 1), _event("skip", 2.5, step=2)]
    assert recovery_of([*skipped, _window(3.0, 3)], 1.5, float("inf")).noticed == 1.0


def test_events_after_the_next_fault_belong_to_it():
    assert recovery_of(_KILLED, 8.5, until=13.0).restored is None


def test_shares_of_the_wall_time_are_those_of_the_goodput():
    waiting = [*_KILLED, _window(24.0, 8, waited=3.0)]
    found, expected = shares_of(waiting, 100.0), Goodput(waiting)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["steps"] == pytest.approx(expected.ratio())
    assert found["repeated"] * 24.0 == pytest.approx(expected.seconds()["redone"])
    assert found["data"] * 24.0 == pytest.approx(3.0)


_RESTARTED, _PAUSED = Recovery(0.5, 10.5, 3, pause=7.5), Recovery(None, None, 0, pause=3.0)


@pytest.mark.parametrize(
    ("recoveries", "must_restart", "expected"),
    [
        ([_RESTARTED, _RESTARTED], True, AS_EXPECTED),
        ([_RESTARTED, _PAUSED], True, "1 restarts, not 2"),
        ([_PAUSED], False, AS_EXPECTED),
        ([_RESTARTED], False, "1 restarts, not 0"),
        ([_RESTARTED], None, AS_EXPECTED),
        ([_PAUSED], None, AS_EXPECTED),
    ],
)
def test_restarts_are_judged_by_what_each_fault_must_do(
    recoveries: list[Recovery], must_restart: bool | None, expected: str
):
    found = judge_restarts(recoveries, must_restart)
    assert found == expected
    row = Row("a fault", _RESTARTED, 1920, 0, 0, NOT_PROMISED, found)
    assert row.is_good == (expected == AS_EXPECTED)
