"""Measurements of one rank: windows of steps by host clocks, phases by the device's, its GPU.

A window is the time between two log steps or checkpoints. Reading it costs plain sums; no step
waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from svfap_dist.profiling.trace import named_range
from svfap_dist.telemetry import metrics
from svfap_dist.telemetry.metrics import DATA_WAIT_SECONDS, OWN_SECONDS, STEP_SECONDS, Metric

Item = TypeVar("Item")
_UNNAMED = contextlib.nullcontext()
# Set by Nsight Systems in the processes it profiles. Not NVTX_INJECTION64_PATH, which some images
# always set: a range would then load a library that keeps torch's profiler from the GPU.
_NSYS_VARIABLE = "NSYS_PROFILING_SESSION_ID"


@dataclasses.dataclass(frozen=True)
class Window:
    """Values of windowed metrics over the steps of one rank, by name of the metric.

    Times of the loader's threads and workers run beside the steps and may exceed the wall time.
    """

    steps: int
    values: dict[str, float]


class Meter:
    """Adds up windowed metrics; `window` returns the sums and resets them.

    Args:
        clock: Seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._began, self._steps = self._clock(), 0
        self._sums: dict[str, float] = {metric.name: 0 for metric in metrics.windowed_metrics()}

    def waiting(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yield batches, counting the time that each `next` takes as waiting for data.

        Args:
            batches: Batches of the loader.
        """
        while True:
            began = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            waited = self._clock() - began
            self.add({DATA_WAIT_SECONDS: waited, OWN_SECONDS: waited})
            yield batch

    def add(self, values: Mapping[Metric, float]) -> None:
        """Add amounts to windowed metrics.

        Args:
            values: The amounts.
        """
        for metric, value in values.items():
            self._sums[metric.name] += value

    def count_step(self, values: Mapping[Metric, float]) -> None:
        """Count one step.

        Args:
            values: Amounts to add to windowed metrics.
        """
        self._steps += 1
        self.add(values)

    def leave_out(self, seconds: float) -> None:
        """Leave out time that has just passed and was not spent on steps.

        Args:
            seconds: Wall time.
        """
        self._began += seconds

    def window(self) -> Window:
        """Return the sums (of gauges: the means) since the last call."""
        self._sums[STEP_SECONDS.name] = self._clock() - self._began
        for metric in metrics.windowed_metrics():
            if not metric.is_counter:
                self._sums[metric.name] /= max(self._steps, 1)
        window = Window(self._steps, self._sums)
        self._reset()
        return window


class Phases:
    """Adds up the time spent in named phases of a step.

    A GPU executes after the call that launched its work has returned, so there CUDA events are
    recorded in its stream and read at a log step: no step waits for them. On CPUs the wall clock
    is enough.

    Args:
        device: Device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.is_traced = False  # then the parts of a step are ranges of a trace, too
        self._is_profiled = _NSYS_VARIABLE in os.environ  # and here
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measured(self, name: str, inside: str = "") -> Iterator[None]:
        """Count the time of the block.

        Args:
            name: Name of the phase.
            inside: Phase that the block is a part of, which does not count it; "": none.
        """
        with self.range(name):
            if not self._on_gpu:
                began = time.perf_counter()
                yield
                self._add(name, inside, time.perf_counter() - began)
                return
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, inside, begin, end))

    def range(self, name: str) -> AbstractContextManager[None]:
        """Return a context that names the block in a trace of this step and to Nsight Systems.

        Args:
            name: Of the part of a step.
        """
        return named_range(name) if self.is_traced or self._is_profiled else _UNNAMED

    def _add(self, name: str, inside: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if inside:
            self._seconds[inside] = self._seconds.get(inside, 0.0) - seconds

    def take_seconds(self) -> dict[str, float]:
        """Return seconds by phase since the last call; unfinished GPU work counts next time."""
        pending = []
        for name, inside, begin, end in self._events:
            if end.query():
                self._add(name, inside, begin.elapsed_time(end) / 1000)
            else:
                pending.append((name, inside, begin, end))
        self._events = pending
        seconds, self._seconds = self._seconds, {}
        return seconds


def gpu_readings() -> dict[Metric, float]:
    """Return this rank's GPU memory in bytes and, by NVML, utilization from 0 to 1; CPU: {}."""
    if not torch.cuda.is_available():
        return {}
    found: dict[Metric, float] = {metrics.GPU_MEMORY: torch.cuda.memory_reserved()}
    # Without nvidia-ml-py, or where NVML fails (MIG, missing rights), only the memory is known.
    # NVML's errors have no base class of their own, and a gauge is no reason to end a run.
    with contextlib.suppress(Exception):
        found[metrics.GPU_UTILIZATION] = torch.cuda.utilization() / 100
    return found
