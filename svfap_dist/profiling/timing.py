"""Clocks and rates, and measurements that take turns.

Variants that are compared run in turns, round by round, because machines get faster and slower
meanwhile; medians of the rounds count. CPU time includes all processes below this one, because
decoding and loading happen in child processes.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from svfap_dist.parallel.processes import ChildProcess
from svfap_dist.progress import Progress

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
_MAX_MEMORY_READINGS = 1000


@dataclasses.dataclass(frozen=True)
class Rate:
    """Clips made in some time."""

    clips: int  # how many
    seconds: float  # wall time
    cpu_seconds: float  # CPU time of all processes
    rss_slope_bytes: float = 0.0  # growth of the resident memory per batch, over all processes
    bytes_fetched: int = 0  # from the store
    all_bytes_fetched: int = 0  # before the clock started, too

    @property
    def per_second(self) -> float:
        """Clips per second of wall time."""
        return self.clips / self.seconds

    @property
    def per_cpu_second(self) -> float:
        """Clips per second of CPU time."""
        return self.clips / self.cpu_seconds

    @classmethod
    def combine(cls, rates: Sequence[Rate]) -> Rate:
        """Return the rate of several measurements, with the median of their memory slopes.

        Args:
            rates: one or more.
        """
        slope = statistics.median(rate.rss_slope_bytes for rate in rates)
        totals = (
            sum(getattr(rate, name) for rate in rates)
            for name in ("clips", "seconds", "cpu_seconds", "bytes_fetched", "all_bytes_fetched")
        )
        clips, seconds, cpu_seconds, fetched, all_fetched = totals
        return cls(clips, seconds, cpu_seconds, slope, fetched, all_fetched)


def seconds_of(
    action: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds that one call takes.

    Args:
        action: function without arguments.
        clock: returns seconds; `time.process_time` for CPU time.
    """
    began = clock()
    action()
    return clock() - began


def repeat(
    work: Callable[[], int], min_seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Rate:
    """Call `work` until some time has passed, and return its rate. Warm up before.

    Args:
        work: returns how many clips it made.
        min_seconds: by `clock`.
        clock: decides when it is enough; `time.process_time` where a machine is shared.
    """
    clips, began, wall_began, cpu_began = 0, clock(), time.perf_counter(), time.process_time()
    while not clips or clock() - began < min_seconds:
        clips += work()
    return Rate(clips, time.perf_counter() - wall_began, time.process_time() - cpu_began)


def take_turns(
    variants: Mapping[str, Callable[[int], _Result]],
    rounds: int,
    *,
    warm_up: int = 0,
    title: str = "Rounds",
    note: Callable[[str, _Result], str] = lambda name, result: name,
) -> dict[str, list[_Result]]:
    """Run all variants in every round, and return their results of the rounds after the warm-up.

    Args:
        variants: by name; each is called with the number of the round, from 0.
        rounds: that count.
        warm_up: rounds before them.
        title: of the progress bar; "": none.
        note: what the progress bar shows of a result.
    """
    results: dict[str, list[_Result]] = {name: [] for name in variants}
    total = (warm_up + rounds) * len(variants)
    with Progress(title, total, silent=not title) as progress:
        for number in range(warm_up + rounds):
            for done, (name, variant) in enumerate(variants.items(), number * len(variants) + 1):
                results[name].append(variant(number))
                progress.update(done, note=note(name, results[name][-1]))
    return {name: found[warm_up:] for name, found in results.items()}


def time_batches(batches: Iterable[object], count: int, clips_per_batch: int, warm_up: int) -> Rate:
    """Take batches from an iterable and return the rate after the warm-up.

    Batches that are prepared ahead when the clock starts are not subtracted: about as many are
    prepared when it stops.

    Args:
        batches: of any kind; more than `warm_up + count` of them.
        count: batches that are timed.
        clips_per_batch: clips of each.
        warm_up: batches before them.
    """
    iterator = iter(batches)
    for _ in range(warm_up):
        next(iterator)
    resident: list[int] = []
    every = max(count // _MAX_MEMORY_READINGS, 1)
    began, cpu_began = time.perf_counter(), tree_cpu_seconds()
    for number in range(count):
        next(iterator)
        if number % every == 0:
            resident.append(_tree_resident_bytes())
    seconds, cpu_seconds = time.perf_counter() - began, tree_cpu_seconds() - cpu_began
    steps = np.arange(len(resident)) * every
    slope = float(np.polyfit(steps, resident, 1)[0]) if len(resident) > 2 else 0.0
    return Rate(count * clips_per_batch, seconds, cpu_seconds, slope)


def call_in_new_process(function: Callable[[_Argument], _Result], argument: _Argument) -> _Result:
    """Return `function(argument)`, computed in a process that inherits no memory and no threads.

    Args:
        function: picklable; may start processes of its own.
        argument: picklable.
    """
    with ChildProcess(function, seconds=None, may_have_children=True) as process:
        return process(argument)


def tree_cpu_seconds() -> float:
    """Return the CPU time of this process and all below it, those that have ended included."""
    ticks = sum(sum(map(int, values[11:15])) for values in _process_tree())
    return ticks / os.sysconf("SC_CLK_TCK")


def _tree_resident_bytes() -> int:
    return sum(int(values[21]) for values in _process_tree()) * os.sysconf("SC_PAGE_SIZE")


def _process_tree() -> list[list[str]]:
    """Return fields of /proc/PID/stat, from the state on, of this process and all below it."""
    children: dict[int, list[int]] = {}
    fields: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(path.parent.name)] = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has ended
    for pid, values in fields.items():
        children.setdefault(int(values[1]), []).append(pid)
    found, pending = [], [os.getpid()]
    while pending:
        pid = pending.pop()
        found.append(fields[pid])
        pending += children.get(pid, [])
    return found
