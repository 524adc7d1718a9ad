"""Throughput and waits between two log steps: plain sums over host clocks, no device is asked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Window:
    """Sums of one rank over the steps since the last log step.

    seconds: wall time. fetch_seconds, decode_seconds: time of the loader's threads and workers,
    which run beside the steps and may exceed the wall time.
    """

    steps: int
    clips: int
    seconds: float
    data_wait_seconds: float
    fetch_seconds: float
    decode_seconds: float
    bytes_fetched: int
    batches_ready: float  # mean over the steps of what lay ready when a batch was asked for


class Meter:
    """Adds up steps; `window` hands the sums over and begins anew."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waited = 0.0
        self._reset()

    def _reset(self) -> None:
        self._began = self._clock()
        self._steps = self._clips = 0
        self._waited = self._fetched = self._decoded = 0.0
        self._bytes = self._ready = 0

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """`batches`, with the time that each `next` takes counted as waiting for data."""
        while True:
            began = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += self._clock() - began
            yield batch

    def step(
        self,
        clips: int,
        fetch_seconds: float,
        decode_seconds: float,
        bytes_fetched: int = 0,
        batches_ready: int = 0,
    ) -> None:
        """Count one step of this rank."""
        self._steps += 1
        self._clips += clips
        self._fetched += fetch_seconds
        self._decoded += decode_seconds
        self._bytes += bytes_fetched
        self._ready += batches_ready

    def window(self) -> Window:
        """The sums since the last call."""
        window = Window(
            steps=self._steps,
            clips=self._clips,
            seconds=self._clock() - self._began,
            data_wait_seconds=self._waited,
            fetch_seconds=self._fetched,
            decode_seconds=self._decoded,
            bytes_fetched=self._bytes,
            batches_ready=self._ready / max(self._steps, 1),
        )
        self._reset()
        return window
