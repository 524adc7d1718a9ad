"""Goodput: where the wall time of a run went, over all its attempts.

In: the events of a run (lines of events.jsonl), in order. Out: seconds by class, which add up to
the time from the first event to the latest, each second in one class only:

    productive   steps that the weights include, computing
    data_wait    the same steps, waiting for a batch
    checkpoint   training blocked by a checkpoint
    probe        training waits for a probe of the frozen features
    restart      starting up, and the time from the last window of an attempt that died, failed or
                 ended for another number of ranks to the next attempt
    redone       steps of an attempt after the step from which a later one had to continue
    idle         evaluations and tests, the end of an attempt, and the time when no attempt ran

The events of an attempt are start or resume, ready (the first batch is requested), window (the time
since ready or the window before it, ending at a completed step) and stop, which is missing where an
attempt was killed, and has a message where it failed. Source: Google's ML productivity
goodput.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CLASSES = ("productive", "data_wait", "checkpoint", "probe", "restart", "redone", "idle")
WINDOW = "window"
BEGINNINGS = ("start", "resume")  # events of an attempt that begins: its number, step, fingerprints
# Reasons of stop events: the ranks begin again at once, more or fewer of them.
NODES_JOINED, NODES_LEAVING = "nodes joined", "nodes leaving"
RESIZE_REASONS = (NODES_JOINED, NODES_LEAVING)


class Goodput:
    """Wall time of one run by class, updated by `add`.

    Args:
        events: Lines of events.jsonl so far.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self._began: float | None = None
        self._latest = 0.0  # every second up to here is counted
        self._stopped = False  # the latest attempt ended without an error
        self._windows: list[tuple[int, dict[str, float]]] = []  # step at its end, seconds by class
        self._seconds: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Count an event; those of other kinds change nothing.

        Args:
            event: Line of events.jsonl.
        """
        kind, time = event["event"], float(event["time"])
        if kind in BEGINNINGS:
            if self._began is None:
                self._began = self._latest = time
            self._count("idle" if self._stopped else "restart", time)
            self._redo(event["step"])
            self._stopped = False
        elif self._began is None:
            return
        elif kind == "ready":
            self._count("restart", time)
        elif kind == WINDOW:
            self._add_window(event, time)
        elif kind == "stop":
            begins_again = event.get("message") or event.get("reason") in RESIZE_REASONS
            self._stopped = not begins_again
            self._count("idle" if self._stopped else "restart", time)

    def _count(self, name: str, until: float) -> None:
        self._seconds[name] += max(until - self._latest, 0.0)
        self._latest = max(until, self._latest)

    def _add_window(self, event: Mapping[str, Any], time: float) -> None:
        seconds = {
            "data_wait": event["data_wait_seconds"],
            "checkpoint": event["checkpoint_seconds"],
            "probe": event.get("probe_seconds", 0.0),  # not in files of older versions
            "idle": event["evaluation_seconds"],
        }
        seconds["productive"] = max(time - self._latest - sum(seconds.values()), 0.0)
        self._windows.append((event["step"], seconds))
        for name, amount in seconds.items():
            self._seconds[name] += amount
        self._latest = max(time, self._latest)

    def _redo(self, step: int) -> None:
        """Move windows after `step`, which have to be repeated, to class redone."""
        for seconds in (seconds for last, seconds in self._windows if last > step):
            for name, amount in seconds.items():
                self._seconds[name] -= amount
                self._seconds["redone"] += amount
        self._windows = [window for window in self._windows if window[0] <= step]

    def seconds(self) -> dict[str, float]:
        """Return the seconds by class, up to the latest event."""
        return dict(self._seconds)

    def ratio(self) -> float:
        """Return the share of productive seconds in all, 0 before there are any."""
        total = sum(self._seconds.values())
        return self._seconds["productive"] / total if total else 0.0
