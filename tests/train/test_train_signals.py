"""What asks a run to save before its time, on one rank, with a clock of the test's own."""

from __future__ import annotations

import signal

import pytest

from svfap_dist.train.signals import STOP_SIGNALS, Notice, catch_stop_signals, exit_code


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def nothing() -> str:
    return ""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_heard_and_the_second_does_what_it_did_before(number) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda n, _: seen.append(n))
    try:
        with catch_stop_signals() as heard:
            assert heard() == ""
            signal.raise_signal(number)
            assert (heard(), seen) == (signal.Signals(number).name, [])
            signal.raise_signal(number)
            assert seen == [number]
            assert heard() == signal.Signals(number).name
        signal.raise_signal(number)
        assert seen == [number, number]
    finally:
        signal.signal(number, before)


def test_what_was_heard_between_two_runs_stops_the_second() -> None:
    with catch_stop_signals() as outer:
        with catch_stop_signals() as first:
            assert first() == ""
        signal.raise_signal(signal.SIGUSR1)
        with catch_stop_signals() as second:
            assert second() == outer() == "SIGUSR1"
        assert outer() == "SIGUSR1"
    with catch_stop_signals() as later:
        assert later() == ""


def test_time_is_up_after_max_seconds_and_never_without() -> None:
    clock = Clock()
    limited = Notice(nothing, nothing, None, max_seconds=10, clock=clock)
    endless = Notice(nothing, nothing, None, max_seconds=0, clock=clock)
    clock.now += 9.9
    assert limited.stop_reason() == ""
    clock.now += 0.1
    assert limited.stop_reason() == "train.max_seconds"
    clock.now += 1e9
    assert endless.stop_reason() == ""


def test_a_signal_names_the_reason_before_the_launcher_and_the_clock() -> None:
    clock = Clock()
    heard, passed_on = [""], [""]
    notice = Notice(lambda: heard[0], lambda: passed_on[0], None, 1, clock)
    clock.now += 2
    assert notice.stop_reason() == "train.max_seconds"
    passed_on[0] = "SIGTERM"
    assert notice.stop_reason() == "SIGTERM"
    heard[0] = "SIGUSR1"
    assert notice.stop_reason() == "SIGUSR1"


def test_each_leaving_node_is_news_once() -> None:
    leaving = set[str]()
    notice = Notice(nothing, nothing, lambda: frozenset(leaving), 0)
    found = []
    for node in ("", "", "a", "", "b"):
        leaving |= {node} - {""}
        found.append(notice.new_nodes_leaving())
    assert found == [False, False, True, False, True]


def test_a_rank_that_cannot_know_of_nodes_has_no_news() -> None:
    assert not Notice(nothing, nothing, None, 0).new_nodes_leaving()


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("finished", 0),
        ("train.max_seconds", 75),
        ("SIGUSR1", 138),
        ("SIGTERM", 143),
        ("SIGINT", 130),
    ],
)
def test_exit_codes_are_those_the_sbatch_files_know(reason: str, code: int) -> None:
    assert exit_code(reason) == code
