"""How long the phases of a step take, by the clock of the device that works.

A GPU works after the call that asked for it has returned, so there marks are put into its stream
and read when the numbers are fetched, at a log step: no step waits for them. On CPUs the wall clock
says it all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Phases:
    """Adds up the time spent in named phases; phases do not nest."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Book the time of the block on phase `name`."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - began)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._marks.append((name, begin, end))

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def taken(self) -> dict[str, float]:
        """Seconds by phase since the last call; what a GPU has not done yet comes next time."""
        left = []
        for name, begin, end in self._marks:
            if end.query():
                self._add(name, begin.elapsed_time(end) / 1000)
            else:
                left.append((name, begin, end))
        self._marks = left
        seconds, self._seconds = self._seconds, {}
        return seconds
