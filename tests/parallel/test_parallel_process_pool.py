"""A pool serves many threads, survives what kills a process, and ends at once when it is killed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from child_calls import DiesOnArrival, behave

from svfap_dist.parallel.processes import CrashedError, HungError, ProcessPool, StartError


def test_calls_are_shared_and_no_more_processes_than_needed_start() -> None:
    pool = ProcessPool(behave, 2, seconds=60)
    assert pool("pid") == pool("pid")  # one after the other: the second process never starts
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(pool, ["a", "b", "c", "d"])) == ["A", "B", "C", "D"]
    pool.close()


def test_a_crash_and_a_hang_cost_one_call_each() -> None:
    pool = ProcessPool(behave, 1, seconds=1)
    assert pool("a") == "A"
    with pytest.raises(CrashedError, match="code 7"):
        pool("crash")
    with pytest.raises(HungError):
        pool("hang")
    assert pool("b") == "B"
    pool.close()


def test_kill_cancels_calls_under_way_and_later_ones() -> None:
    pool = ProcessPool(behave, 1, seconds=None)
    assert pool("a") == "A"
    threading.Timer(0.3, pool.kill).start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        pool("hang")
    assert time.monotonic() - began < 30
    with pytest.raises(CancelledError):
        pool("a")
    pool.close()


def test_a_process_that_never_starts_is_not_blamed_on_the_request() -> None:
    pool = ProcessPool(DiesOnArrival(), 1, seconds=60)
    with pytest.raises(StartError, match="code"):
        pool("a")
    pool.close()
