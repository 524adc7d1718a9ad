"""Bounded look-ahead: start work before its result is needed, and take the results in order.

In: items and a way to start the work on one. Out: the items' results, in the items' order, with at
most a given number in flight, which bounds the memory. `in_flight` is the loop itself, for callers
that submit the work themselves (several tasks per item, places in a ring of buffers); `ordered_map`
is a map over threads, which may in turn call a `ProcessPool`.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_flight(
    start: Callable[[_Item], _Result], items: Iterable[_Item], limit: int
) -> Generator[tuple[_Item, _Result]]:
    """Yield each item with what `start` returned for it, in order, `limit` items started at most.

    The item last yielded counts as in flight until the next one is requested, so `limit` buffers
    used in turn are enough: the n-th item may use buffer n % limit. Items are taken and started in
    the thread that iterates.

    Args:
        start: Starts the work on an item, without waiting for it, and returns a handle of it.
        items: Taken one by one, as the limit allows.
        limit: Items in flight, at least 1.
    """
    rest = iter(items)
    started: collections.deque[tuple[_Item, _Result]] = collections.deque()
    while True:
        for item in itertools.islice(rest, limit - len(started)):
            started.append((item, start(item)))
        if not started:
            return
        yield started.popleft()


def as_completed(
    start: Callable[[_Item], Future[_Result]], items: Iterable[_Item], limit: Callable[[], int]
) -> Generator[tuple[_Item, Future[_Result]]]:
    """Yield each item with its finished future, in the order of completion.

    Unlike its namesake in `concurrent.futures`, it takes items only while few are in flight.

    Args:
        start: Starts the work on an item and returns its future.
        items: Taken one by one, as the limit allows.
        limit: Returns how many items may be in flight; called again after each completion.
    """
    rest = iter(items)
    started: dict[Future[_Result], _Item] = {}
    while True:
        for item in itertools.islice(rest, max(limit() - len(started), 0)):
            started[start(item)] = item
        if not started:
            return
        for future in wait(started, return_when=FIRST_COMPLETED).done:
            yield started.pop(future), future


def ordered_map(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    threads: int,
    limit: int,
    in_order: bool = True,
    stop: Callable[[], Any] = lambda: None,
) -> Generator[tuple[_Item, _Result]]:
    """Yield each item with the function's result, computed ahead by threads.

    An exception of the function is raised where its result would have been yielded. When the
    iteration ends early (by an exception or `close`), work that has not begun is canceled, and the
    threads are joined: none is left behind. Iterate under `contextlib.closing`.

    Args:
        function: Called with one item in one of the threads.
        items: Taken in the thread that iterates, as the limit allows.
        threads: Threads that call the function.
        limit: Items in flight at most, the one last yielded included.
        in_order: False: in the order of completion, so that a slow item holds up no other.
        stop: Called when the iteration ends early, before the threads are joined; ends the calls
            under way (`ProcessPool.kill`).
    """
    executor = ThreadPoolExecutor(threads)

    def start(item: _Item) -> Future[_Result]:
        return executor.submit(function, item)

    is_done = False
    try:
        if in_order:
            started = in_flight(start, items, limit)
        else:
            started = as_completed(start, items, lambda: limit)
        for item, future in started:
            yield item, future.result()
        is_done = True
    finally:
        if not is_done:
            stop()
        executor.shutdown(wait=True, cancel_futures=True)
