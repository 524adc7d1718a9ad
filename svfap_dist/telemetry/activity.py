"""What the training thread of this process does now, for the watchdog: a name, a step, since when.

The loop calls `begin` at each change, which costs about a microsecond; another thread reads
`current`. A rank is a process of its own, so there is one activity per process.
"""

from __future__ import annotations

import collections
import statistics
import time
from typing import NamedTuple

_WARM_UP_STEPS = 3  # of an attempt, which compile, tune and fill caches
_REMEMBERED = 16  # durations of each activity


class Activity(NamedTuple):  # made in a third of the time of a frozen dataclass
    """One activity. number: counts changes, so that two equal activities differ."""

    name: str
    step: int  # the optimizer step it belongs to, from 1; 0: none
    is_slow: bool  # it may take as long as a collective, not only as long as a step
    number: int
    began: float  # by time.perf_counter


class _Recorder:
    """The activity of now, and how long the last ones took."""

    def __init__(self) -> None:
        self._durations: dict[str, collections.deque[float]] = {}
        self._first_step = 0  # of this attempt
        self._now = Activity("starting", 0, True, 0, time.perf_counter())

    def start(self) -> None:
        """Forget what was before: an attempt starts."""
        self.begin("starting")
        self._durations.clear()  # after that, for it has added the time since the last attempt
        self._first_step = 0

    def begin(self, name: str, step: int = 0, is_slow: bool = False) -> None:
        """Begin an activity of the training thread, which ends the one before.

        Args:
            name: A constant, such as "saving a checkpoint".
            step: The optimizer step it belongs to, from 1; 0: none.
            is_slow: Whether it may take longer than a step. What belongs to no step and the first
                steps of an attempt always may.
        """
        before, now = self._now, time.perf_counter()
        seen = self._durations.get(before.name)
        if seen is None:
            seen = self._durations[before.name] = collections.deque(maxlen=_REMEMBERED)
        seen.append(now - before.began)
        self._first_step = self._first_step or step
        is_slow = is_slow or not step or step - self._first_step < _WARM_UP_STEPS
        self._now = Activity(name, step, is_slow, before.number + 1, now)

    def current(self) -> Activity:
        """Return the activity of now."""
        return self._now

    def median_seconds(self, name: str) -> float:
        """Return the median duration of the last activities of this name, 0 without any.

        Args:
            name: Of the activity.
        """
        return statistics.median(list(self._durations.get(name, ())) or [0.0])


_recorder = _Recorder()
start, begin, current = _recorder.start, _recorder.begin, _recorder.current
median_seconds = _recorder.median_seconds
