"""Results come in order and at most N ahead; errors come at their place; nothing is left behind."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from svfap_dist.parallel.processes import in_flight, ordered_map


def endless(taken: list[int]) -> Iterator[int]:
    for number in itertools.count():
        taken.append(number)
        yield number


def slow_when_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    return number * number


@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_order(threads: int) -> None:
    found = list(ordered_map(slow_when_even, range(20), threads=threads, limit=6))
    assert found == [(n, n * n) for n in range(20)]


def test_no_more_are_taken_than_the_limit_allows() -> None:
    taken: list[int] = []
    results = ordered_map(slow_when_even, endless(taken), threads=2, limit=5)
    for done in range(1, 10):
        next(results)
        assert len(taken) == done + 4
    results.close()


def test_the_one_last_yielded_is_in_flight() -> None:
    buffers = [-1] * 3

    def start(number: int) -> int:
        buffers[number % 3] = number
        return number

    for number, handle in in_flight(start, range(10), 3):
        assert buffers[number % 3] == number == handle  # not overwritten while it is looked at


def test_an_exception_comes_in_place_of_its_result_and_stops_the_rest() -> None:
    begun: list[int] = []
    stopped: list[bool] = []

    def fail_at_three(number: int) -> int:
        begun.append(number)
        return 1 // (number - 3)

    results = ordered_map(
        fail_at_three, endless([]), threads=1, limit=4, stop=lambda: stopped.append(True)
    )
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert stopped == [True]
    assert len(begun) < 8


def test_closing_ends_calls_under_way_and_joins_the_threads() -> None:
    ended = threading.Event()
    threads_before = threading.active_count()
    results = ordered_map(
        lambda number: number and ended.wait(60), range(9), threads=2, limit=4, stop=ended.set
    )
    assert next(results) == (0, 0)
    results.close()
    assert threading.active_count() == threads_before


def test_a_slow_item_holds_up_no_other_without_order() -> None:
    first = threading.Event()
    results = ordered_map(
        lambda number: first.wait(60) if number == 0 else number,
        range(4),
        threads=2,
        limit=2,
        in_order=False,
    )
    assert [next(results)[0] for _ in range(3)] == [1, 2, 3]
    first.set()
    assert list(results) == [(0, True)]
