"""Clocks, rates and turns."""

from __future__ import annotations

import functools
import mmap
import time

import pytest

from svfap_dist.profiling import timing
from svfap_dist.profiling.timing import Rate


def test_only_batches_after_the_warm_up_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0

    def endless():
        nonlocal seconds
        for number in range(100):
            seconds += 100.0 if number < 3 else 2.0  # starting up takes long
            yield number

    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds)
    rate = timing.time_batches(endless(), 5, 64, warm_up=3)
    assert (rate.clips, rate.seconds) == (5 * 64, 5 * 2.0)


def test_memory_that_grows_is_seen() -> None:
    def leaking():
        kept = []
        while True:
            kept.append(mmap.mmap(-1, 2**20))  # new pages, whatever the heap has to spare
            kept[-1].write(b"x" * 2**20)
            yield len(kept)

    rate = timing.time_batches(leaking(), 40, 64, warm_up=2)
    assert 0.7 * 2**20 < rate.rss_slope_bytes < 1.4 * 2**20


def test_cpu_time_of_processes_below_counts() -> None:
    began = timing.tree_cpu_seconds()
    burnt = timing.call_in_new_process(_burn, 0.25)
    assert burnt >= 0.2
    assert timing.tree_cpu_seconds() - began >= burnt


def _burn(seconds: float) -> float:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass
    return timing.tree_cpu_seconds()


def test_rates_add_up() -> None:
    whole = Rate.combine([Rate(10, 1.0, 2.0, 5.0), Rate(20, 2.0, 2.0, 7.0), Rate(0, 0, 0, 9.0)])
    assert whole == Rate(30, 3.0, 4.0, 7.0)
    assert (whole.per_second, whole.per_cpu_second) == (10, 7.5)


def test_work_is_repeated_for_long_enough() -> None:
    ticks = iter(range(100))
    assert timing.repeat(lambda: 3, 4, lambda: next(ticks)).clips == 3 * 4
    assert timing.repeat(lambda: 3, 0).clips == 3  # once in any case


def test_variants_take_turns() -> None:
    turns: list[tuple[str, int]] = []

    def variant(name: str, number: int) -> int:
        turns.append((name, number))
        return number

    variants = {name: functools.partial(variant, name) for name in "ab"}
    found = timing.take_turns(variants, 2, warm_up=1, title="")
    assert found == {"a": [1, 2], "b": [1, 2]}
    assert turns == [(name, number) for number in range(3) for name in "ab"]
