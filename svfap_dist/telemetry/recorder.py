"""Record a run while it trains: meter, journal and metrics endpoint of one rank.

In: batches, losses, outcomes, as they occur. Out: lines in the files of the run (rank 0, and each
rank its ledger), numbers at each rank's /metrics, and rows for callbacks. A window is the time
between two log steps or checkpoints; its event says how its time was spent, so that the run's
goodput can be computed from the events alone.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

from svfap_dist import distributed
from svfap_dist.config import Config
from svfap_dist.data.batch import ClipBatch
from svfap_dist.distributed import World
from svfap_dist.telemetry import metrics
from svfap_dist.telemetry.events import EventRecorder, Row
from svfap_dist.telemetry.exporter import Exporter
from svfap_dist.telemetry.goodput import CLASSES, WINDOW
from svfap_dist.telemetry.journal import METRICS_FILE, QUARANTINE_FILE, Journal
from svfap_dist.telemetry.meter import Meter, Window, gpu_readings
from svfap_dist.telemetry.tracking import Tracking, chosen_trackers

_OWN_PHASES = ("forward", "backward")
_RANKS_NAMED = 3  # in metrics.jsonl
_COMBINE: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min}


class Recorder(EventRecorder):
    """Records of one rank's attempt; made and closed by all ranks together.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.
        attempt: Number of the attempt, from 1.
        step: Completed optimizer steps at which it starts.
        on_log: Called with each row of metrics, on rank 0.
        on_begin: Called with all ranks' metrics addresses, on rank 0.
        costs: Floating-point operations and tokens of a clip in a training step.
        peak_rate: Operations per second of a device at best; None if unknown.

    Raises:
        ClusterError: On every rank, if a port is refused on any.
        StorageError: On every rank, if files cannot be written on any.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        attempt: int,
        step: int,
        on_log: Callable[[Row], None],
        on_begin: Callable[[list[str]], None],
        costs: tuple[int, int],
        peak_rate: float | None,
    ) -> None:
        self._on_log = on_log
        self._flops_per_clip, self._tokens_per_clip = costs
        self._peak_rate = peak_rate
        self._windows: list[Window] = []  # of all ranks, since the last log step
        # Since the last window.
        self._checkpoint_seconds = self._probe_seconds = self._idle_seconds = 0.0
        self._own_seconds = [0.0] * world.world_size  # of each rank, since the last log step
        # Of each source, to name the one that a bad sample is of; `Attempt` sets it.
        self.samples_of_sources: tuple[int, ...] = ()
        self._bad: list[Row] = []  # bad samples that are not yet in the quarantine list
        self.meter = Meter()
        with contextlib.ExitStack() as stack:
            exporter = distributed.run_on_all_ranks(
                lambda: Exporter(config.metrics, config.run.name, world.rank, world.local_rank)
            )
            stack.callback(exporter.close)
            for source in config.data.labels:
                for metric in (metrics.SOURCE_CLIPS, metrics.SOURCE_BAD_SAMPLES):
                    exporter.add(metric, 0, source=source)
            tracking: Tracking | None = None
            if world.is_main and chosen_trackers(config.track):
                tracking = stack.enter_context(Tracking(config, step))
            on_line = tracking.write_line if tracking is not None else _ignore_line
            journal = distributed.run_on_all_ranks(
                lambda: Journal(config, world.rank, attempt, step, on_line=on_line)
            )
            stack.enter_context(journal)
            super().__init__(config, world, attempt, on_begin, exporter, journal, tracking)
            self._closing = stack.pop_all()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def record_ready(self) -> None:
        """Record that the set-up is done: from now on time belongs to steps."""
        self._write_event("ready")
        self.meter.window()

    def count_step(self, step: int, batch: ClipBatch) -> None:
        """Count this rank's batch of a step and write its ledger.

        Args:
            step: Number of the step, from 1.
            batch: This rank's clips.
        """
        clips = len(batch.frames)
        self.meter.count_step(
            {
                metrics.CLIPS: clips,
                metrics.FETCH_SECONDS: batch.fetch_seconds,
                metrics.DECODE_SECONDS: batch.decode_seconds,
                metrics.FETCHED_BYTES: batch.bytes_fetched,
                metrics.BATCHES_READY: batch.batches_ready,
            }
        )
        self._exporter.add(metrics.TOKENS, clips * self._tokens_per_clip)
        self._exporter.add(metrics.FLOPS, clips * self._flops_per_clip)
        of_sources = [clips]  # of one, or of noise, which no source has
        if batch.sources is not None:
            of_sources = batch.sources.bincount(minlength=len(self._sources)).tolist()
        for source, count in zip(self._sources, of_sources, strict=False):
            self._exporter.add(metrics.SOURCE_CLIPS, count, source=source)
        for bad in batch.bad:
            ends = list(itertools.accumulate(self.samples_of_sources))
            source = self._sources[bisect.bisect_right(ends, bad.index) if ends else 0]
            self._bad.append({"step": step, **dataclasses.asdict(bad), "source": source})
            self._exporter.add(metrics.BAD_SAMPLES, 1, reason=bad.reason)
            self._exporter.add(metrics.SOURCE_BAD_SAMPLES, 1, source=source)
        self._journal.write_ledger(batch.ledger)

    def close_window(self, step: int) -> int:
        """Record the time up to a completed step; a collective.

        Args:
            step: Completed optimizer steps.

        Returns:
            Number of all ranks' bad samples that are not yet in the quarantine list.
        """
        window = self.meter.window()
        for metric in metrics.windowed_metrics():
            if metric.is_counter:
                self._exporter.add(metric, window.values[metric.name])
            elif window.steps:
                self._exporter.set(metric, window.values[metric.name])
        own = [window.values[metric.name] for metric in metrics.windowed_metrics()]
        # A few numbers in one collective: pickles of hundreds of ranks cost more than a step.
        *columns, bad = zip(*distributed.all_gather_numbers([*own, len(self._bad)]), strict=True)
        values = {
            metric.name: _like(mine, _COMBINE[metric.over_ranks](list(column)))
            for metric, mine, column in zip(metrics.windowed_metrics(), own, columns, strict=True)
        }
        self._windows.append(Window(window.steps, values))
        names = [metric.name for metric in metrics.windowed_metrics()]
        of_ranks = columns[names.index(metrics.OWN_SECONDS.name)]
        self._own_seconds = [sum(pair) for pair in zip(self._own_seconds, of_ranks, strict=True)]
        self._write_event(
            WINDOW,
            step=step,
            data_wait_seconds=values[metrics.DATA_WAIT_SECONDS.name],
            checkpoint_seconds=self._checkpoint_seconds,
            probe_seconds=self._probe_seconds,
            evaluation_seconds=self._idle_seconds,
        )
        self._checkpoint_seconds = self._probe_seconds = self._idle_seconds = 0.0
        return int(sum(bad))

    def log_step(self, numbers: Row, phase_seconds: dict[str, float]) -> None:
        """Write and show the metrics of a log step, with the throughput since the last one.

        A collective.

        Args:
            numbers: step, total_steps, epoch, loss, lr and grad_norm; of a mixture, source_loss and
                source_clips since the last log step, by name.
            phase_seconds: Seconds of this rank, by phase.
        """
        own = sum(phase_seconds.get(name, 0.0) for name in _OWN_PHASES)
        self.meter.add({metrics.OWN_SECONDS: max(own, 0.0)})
        num_bad = self.close_window(numbers["step"])
        windows, self._windows = self._windows, []
        totals = {
            metric.name: sum(each.values[metric.name] for each in windows)
            if metric.is_counter
            else _COMBINE[metric.over_ranks]([w.values[metric.name] for w in windows if w.steps])
            for metric in metrics.windowed_metrics()
        }
        seconds = totals[metrics.STEP_SECONDS.name]
        waited = totals[metrics.DATA_WAIT_SECONDS.name]
        row = {
            **numbers,
            "clips_per_second": totals[metrics.CLIPS.name] / seconds,
            "data_wait_seconds": waited,
            "data_wait_share": waited / seconds,
            **{m.column: totals[m.name] for m in metrics.windowed_metrics() if m.column},
            "slowest_ranks": self._slowest_ranks(seconds),
            "bad_samples": num_bad,
            "time": time.time(),
        }
        if num_bad:
            self.write_quarantine()
        self._show(row, phase_seconds)
        self._journal.write_line(METRICS_FILE, row)
        if self._world.is_main:
            self._on_log(row)

    def _slowest_ranks(self, seconds: float) -> list[tuple[int, float]]:
        """Return the ranks that cost most since the last log step, and their share of the time."""
        own, self._own_seconds = self._own_seconds, [0.0] * self._world.world_size
        median = statistics.median_low(own)  # of two ranks, that of the faster one
        costs = [max(each - median, 0.0) / seconds for each in own]
        self._exporter.set(metrics.STRAGGLER_COST, costs[self._world.rank])
        ranked = sorted(enumerate(costs), key=lambda item: -item[1])
        return [(rank, round(cost, 4)) for rank, cost in ranked[:_RANKS_NAMED] if cost > 0]

    def _show(self, row: Row, phase_seconds: dict[str, float]) -> None:
        for metric in metrics.PROMETHEUS_METRICS.values():
            if metric.column and not metric.over_ranks:
                self._exporter.set(metric, row[metric.column])
        for source, loss in row.get("source_loss", {}).items():
            self._exporter.set(metrics.SOURCE_LOSS, loss, source=source)
        for phase, seconds in phase_seconds.items():
            self._exporter.add(metrics.PHASE_SECONDS, seconds, phase=phase)
        for metric, value in gpu_readings().items():
            self._exporter.set(metric, value)
        if self._peak_rate is not None:
            rate = row["clips_per_second"] * self._flops_per_clip / self._world.world_size
            self._exporter.set(metrics.MFU, rate / self._peak_rate)
        if self._world.is_main:  # only rank 0 has the run's events
            self._exporter.set(metrics.GOODPUT, self._goodput.ratio())
            seconds_of = self._goodput.seconds()
            for name in CLASSES:
                self._exporter.set(metrics.RUN_SECONDS, seconds_of[name], **{"class": name})

    def write_quarantine(self) -> None:
        """Write all ranks' new bad samples; a collective."""
        for rows in distributed.all_gather_object(self._bad):
            for row in rows:
                self._journal.write_line(QUARANTINE_FILE, row)
        self._bad = []

    def record_evaluation(self, step: int, held_out_loss: float, seconds: float) -> None:
        """Record a held-out loss.

        Args:
            step: Completed optimizer steps.
            held_out_loss: Mean over all ranks.
            seconds: Wall time of the evaluation.
        """
        self._idle_seconds += seconds
        self._journal.write_event("eval", step=step, held_out_loss=held_out_loss)
        self._exporter.set(metrics.HELD_OUT_LOSS, held_out_loss)

    def add_probe_seconds(self, seconds: float) -> None:
        """Count time in which training waited for a probe, which is not time of its steps.

        Args:
            seconds: Wall time.
        """
        self._probe_seconds += seconds
        self.meter.leave_out(seconds)
        if self._world.is_main:
            self._exporter.set(metrics.PROBE_SECONDS, seconds)

    def add_trace_seconds(self, seconds: float) -> None:
        """Count time in which training waited for the end of a trace, not time of its steps.

        Args:
            seconds: Wall time.
        """
        self._idle_seconds += seconds
        self.meter.leave_out(seconds)

    def add_test_seconds(self, seconds: float) -> None:
        """Count time spent on testing, which is idle time of the training.

        Args:
            seconds: Wall time.
        """
        self._idle_seconds += seconds

    def add_checkpoint_seconds(self, seconds: float) -> None:
        """Count time in which training was blocked by a checkpoint.

        Args:
            seconds: Wall time.
        """
        self._checkpoint_seconds += seconds
        self._exporter.add(metrics.CHECKPOINT_SECONDS, seconds)


def _ignore_line(name: str, line: Row) -> None:
    """Do nothing with a line of a run without trackers."""


def _like(own: float, combined: float) -> float:
    """Return a combined value as a whole number where this rank's is one: bytes, clips."""
    return int(combined) if isinstance(own, int) and combined.is_integer() else combined
