"""Trace some steps of a run: what host and device do when, and who holds which memory.

In: `profile.steps` of the recipe. Out, for each rank, below profile/ of the run: a trace by torch's
profiler with each allocation, as Chrome's and Perfetto's viewers read it; the operations that took
most time, as text; and on a GPU a snapshot of torch's allocator with its history. The parts of a
step are named ranges in the trace, and NVTX ranges on a GPU. A step that is not traced does nothing
of this, unless Nsight Systems profiles the process: then it has the NVTX ranges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from svfap_dist import storage

log = logging.getLogger(__name__)

FOLDER = "profile"
_TRACE_NAME = re.compile(r"steps-(\d+)-")
_OPERATIONS = 30  # in the text
_HISTORY = 100_000  # allocations and frees that a GPU's snapshot remembers


@contextlib.contextmanager
def named_range(name: str) -> Iterator[None]:
    """Show the block under a name in the trace, and to NVIDIA's tools on a GPU.

    Args:
        name: Of the part of a step.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(name))
        if torch.cuda.is_available():
            stack.enter_context(torch.cuda.nvtx.range(name))
        yield


def has_trace(run_url: str, steps: range) -> bool:
    """Return whether a trace that begins at one of some steps is stored.

    Args:
        run_url: URL of the run.
        steps: The steps.
    """
    names = storage.list_files(storage.join(run_url, FOLDER))
    firsts = (_TRACE_NAME.match(name) for name in names)
    return any(first is not None and int(first[1]) in steps for first in firsts)


@dataclasses.dataclass(frozen=True)
class StoredTrace:
    """Where a trace is. files: names below the run's folder, none if that failed."""

    first: int  # traced step, from 1
    last: int
    files: tuple[str, ...]
    seconds: float  # of writing


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was recorded. profile: torch's; snapshot: of a GPU's memory."""

    first: int  # traced step, from 1
    last: int
    profile: Any
    snapshot: Any = None

    def write(self, run_url: str, rank: int) -> StoredTrace:
        """Store it, in any thread; a failure is a warning.

        Args:
            run_url: URL of the run.
            rank: Number of this rank.

        Returns:
            Where it is.
        """
        began, files = time.perf_counter(), ()
        stem = f"steps-{self.first:09d}-{self.last:09d}.rank-{rank:04d}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._export(os.path.join(folder, stem))
                names = sorted(os.listdir(folder))
                for name in names:
                    data = storage.read_bytes(os.path.join(folder, name))
                    storage.write_bytes(storage.join(run_url, FOLDER, name), data)
            files = tuple(f"{FOLDER}/{name}" for name in names)
        except Exception as error:
            log.warning("The trace of rank %d is not stored: %s", rank, error)
        return StoredTrace(self.first, self.last, files, time.perf_counter() - began)

    def _export(self, stem: str) -> None:
        self.profile.export_chrome_trace(f"{stem}.trace.json.gz")
        order = "self_cpu_time_total" if self.snapshot is None else "self_device_time_total"
        table = self.profile.key_averages().table(sort_by=order, row_limit=_OPERATIONS)
        storage.write_bytes(f"{stem}.operations.txt", table.encode())
        if self.snapshot is not None:
            storage.write_bytes(f"{stem}.memory.pickle", pickle.dumps(self.snapshot))


class StepTracer:
    """Traces some steps of one rank.

    What fails here is a warning: a run does not end for its profile.

    Args:
        device: Device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._first = self._last = 0  # traced step
        self._profile: Any = None
        self._step = contextlib.ExitStack()  # the range of the whole step, by torch's own name
        self._has_failed = False

    @property
    def is_running(self) -> bool:
        """Return whether steps are traced now."""
        return self._profile is not None

    def begin_step(self, step: int) -> None:
        """Trace a step, which begins now; the trace starts with the first one.

        Args:
            step: Number of the step.
        """
        self._last = step
        if self._profile is None and not self._has_failed:
            self._first = step
            self._start()
        if self._profile is not None:
            self._step.close()
            self._step.enter_context(torch.profiler.record_function(f"ProfilerStep#{step}"))

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profile = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True, acc_events=True
        )
        try:
            if self._on_gpu:  # symbols of C++ frames would take minutes
                torch.cuda.memory._record_memory_history(stacks="python", max_entries=_HISTORY)
            profile.start()
        except Exception as error:
            self._has_failed = True
            self._forget_memory()
            log.warning("Steps are not traced: %s", error)
            return
        self._profile = profile

    def stop(self) -> Trace | None:
        """End the trace, if there is one, and return it."""
        profile, self._profile = self._profile, None
        self._step.close()
        if profile is None:
            return None
        snapshot = None
        try:
            if self._on_gpu:
                torch.cuda.synchronize(self._device)
                snapshot = torch.cuda.memory._snapshot()
            profile.stop()
        except Exception as error:
            log.warning("The trace of steps is lost: %s", error)
            return None
        finally:
            self._forget_memory()
        return Trace(self._first, self._last, profile, snapshot)

    def _forget_memory(self) -> None:
        if self._on_gpu:
            with contextlib.suppress(RuntimeError):  # after an error of the device
                torch.cuda.memory._record_memory_history(enabled=None)
