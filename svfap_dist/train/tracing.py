"""Trace the steps of `profile.steps` while a run trains, and record where the traces are."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.errors import SvfapError
from svfap_dist.profiling.trace import StepTracer, StoredTrace, has_trace
from svfap_dist.telemetry import activity
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.train.engine import Engine

log = logging.getLogger(__name__)


def _warn_if_nothing_is_traced(config: Config, attempt: range) -> None:
    """Warn if `profile.steps` are none of the attempt's, and no earlier attempt traced them."""
    if not config.profile.steps or not attempt:
        return
    first, last = config.profile.steps
    if attempt.start < last and first <= attempt.stop:
        return
    try:
        if has_trace(config.run.url, range(first, last + 1)):
            return
    except SvfapError as error:  # a warning more is better than no run
        log.debug("%s", error)
    log.warning(
        "No step is traced: profile.steps = [%d, %d], but this attempt takes the steps %d to %d. "
        "Choose some of those.",
        first,
        last,
        attempt.start + 1,
        attempt.stop,
    )


class StepTracing:
    """The traced steps of one rank's attempt. A thread stores the trace while training continues.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.
        engine: Engine of the run.
        recorder: Records of the attempt.
        attempt: Completed steps before each step that the attempt takes.
    """

    def __init__(
        self, config: Config, world: World, engine: Engine, recorder: Recorder, attempt: range
    ) -> None:
        self._phases, self._recorder = engine.phases, recorder
        self._run_url, self._rank = config.run.url, world.rank
        self._steps = range(0)
        if config.profile.steps:
            first, last = config.profile.steps
            self._steps = range(first, min(last, attempt.stop) + 1)
        if world.is_main:
            _warn_if_nothing_is_traced(config, attempt)
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
