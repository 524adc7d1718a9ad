"""Trace the steps of `profile.steps` while a run trains, and record where the traces are."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.profiling.trace import StepTracer, StoredTrace
from svfap_dist.telemetry import activity
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.train.engine import Engine


class StepTracing:
    """The traced steps of one rank's attempt. A thread stores the trace while training continues.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.
        engine: Engine of the run.
        recorder: Records of the attempt.
        total_steps: Of the run.
    """

    def __init__(
        self, config: Config, world: World, engine: Engine, recorder: Recorder, total_steps: int
    ) -> None:
        self._phases, self._recorder = engine.phases, recorder
        self._run_url, self._rank = config.run.url, world.rank
        self._steps = range(0)
        if config.profile.steps:
            first, last = config.profile.steps
            self._steps = range(first, min(last, total_steps) + 1)
        self._tracer = StepTracer(engine.device)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trace")
        self._writing: Future[StoredTrace] | None = None

    def begin_step(self, step: int) -> None:
        """Start, continue or end the trace before a step.

        Args:
            step: Number of the step, from 1.
        """
        if step in self._steps:
            if not self._tracer.is_running:
                activity.begin("starting the trace of steps", step, is_slow=True)
            self._tracer.begin_step(step)
            self._phases.is_traced = self._tracer.is_running
        elif self._tracer.is_running:
            self._end()
        elif self._writing is not None and self._writing.done():
            self._record(self._writing.result())

    def finish(self) -> None:
        """End the trace, if there is one, and wait until it is stored."""
        if self._tracer.is_running:
            self._end()
        if self._writing is not None:
            activity.begin("storing the trace of steps", is_slow=True)
            self._record(self._writing.result())

    def _end(self) -> None:
        activity.begin("ending the trace of steps", is_slow=True)
        self._phases.is_traced, began = False, time.perf_counter()
        trace = self._tracer.stop()
        self._recorder.add_trace_seconds(time.perf_counter() - began)
        if trace is not None:
            self._writing = self._pool.submit(trace.write, self._run_url, self._rank)

    def _record(self, stored: StoredTrace) -> None:
        self._writing = None
        if stored.files:
            self._recorder.record_profile(stored)

    def close(self) -> None:
        """End the trace without storing it, and wait for one that is being stored."""
        self._tracer.stop()
        self._pool.shutdown()
