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
import json
import logging
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from svfap_dist import distributed, storage
from svfap_dist.config import Config
from svfap_dist.data.batch import ClipBatch
from svfap_dist.distributed import World
from svfap_dist.profiling.trace import StoredTrace
from svfap_dist.telemetry import metrics
from svfap_dist.telemetry.exporter import Exporter
from svfap_dist.telemetry.goodput import BEGINNINGS, CLASSES, WINDOW, Goodput
from svfap_dist.telemetry.journal import (
    EVENTS_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    STALL_FILE,
    STALLS_FOLDER,
    Journal,
    write_failure,
)
from svfap_dist.telemetry.meter import Meter, Window, gpu_readings
from svfap_dist.telemetry.restart import FIRST_STEP
from svfap_dist.telemetry.tracking import Tracking, chosen_trackers

log = logging.getLogger(__name__)
Row = dict[str, Any]
STALL = "stall"
_LOOPBACK = ("127.", "localhost:", "::1:")
_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 - to listen on; not an address to connect to
_OWN_PHASES = ("forward", "backward")
_RANKS_NAMED = 3  # in metrics.jsonl
_COMBINE: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min}


class Recorder:
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
        self._config, self._world, self._attempt = config, world, attempt
        self._on_log, self._on_begin = on_log, on_begin
        self._flops_per_clip, self._tokens_per_clip = costs
        self._peak_rate = peak_rate
        self._windows: list[Window] = []  # of all ranks, since the last log step
        # Since the last window.
        self._checkpoint_seconds = self._probe_seconds = self._idle_seconds = 0.0
        self._own_seconds = [0.0] * world.world_size  # of each rank, since the last log step
        self._sources = config.data.labels
        # Of each source, to name the one that a bad sample is of; `Attempt` sets it.
        self.samples_of_sources: tuple[int, ...] = ()
        self._bad: list[Row] = []  # bad samples that are not yet in the quarantine list
        self.meter = Meter()
        with contextlib.ExitStack() as stack:
            self._exporter = distributed.run_on_all_ranks(
                lambda: Exporter(config.metrics, config.run.name, world.rank, world.local_rank)
            )
            stack.callback(self._exporter.close)
            for source in self._sources:
                for metric in (metrics.SOURCE_CLIPS, metrics.SOURCE_BAD_SAMPLES):
                    self._exporter.add(metric, 0, source=source)
            self._tracking: Tracking | None = None
            if world.is_main and chosen_trackers(config.track):
                self._tracking = stack.enter_context(Tracking(config, step))
            journal = distributed.run_on_all_ranks(
                lambda: Journal(config, world.rank, attempt, step, on_line=self._track_line)
            )
            self._journal = stack.enter_context(journal)
            self._past = journal.read_lines(EVENTS_FILE) if world.is_main else []
            self._goodput = Goodput(self._past)
            self._rollbacks = sum(event["event"] == "rollback" for event in self._past)
            self._closing = stack.pop_all()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _track_line(self, name: str, line: Row) -> None:
        if self._tracking is not None:
            self._tracking.write_line(name, line)

    @property
    def is_tracked(self) -> bool:
        """Return whether this rank sends what it records to trackers."""
        return self._tracking is not None

    def track_picture(self, name: str, step: int, png: bytes) -> None:
        """Send a picture to the trackers, if there are any.

        Args:
            name: Such as "confusion".
            step: Completed optimizer steps.
            png: Content of a PNG file.
        """
        if self._tracking is not None:
            self._tracking.write_picture(name, step, png)

    def sync(self) -> None:
        """Upload the files of the run; may be called from any thread."""
        self._journal.sync()

    def record_start(
        self,
        step: int,
        total_steps: int,
        manifest_fingerprint: str,
        versions: dict[str, str],
        eval_fingerprint: str = "",
        samples: Sequence[int] = (),
    ) -> None:
        """Record that the attempt starts or resumes; a collective.

        Args:
            step: Completed optimizer steps.
            total_steps: Optimizer steps of the whole run.
            manifest_fingerprint: Fingerprint of the data's manifest.
            versions: Versions of the packages that decide the numbers.
            eval_fingerprint: Fingerprint of the validation clips' manifest, if there are any.
            samples: To train on, of each data set; only those of a mixture are recorded.
        """
        self._exporter.set(metrics.STEP, step)
        self._exporter.set(metrics.CHECKPOINT_STEP, step)
        self._exporter.set(metrics.RESTARTS, self._attempt - 1)
        if self._world.is_main:  # only rank 0 has the run's events
            self._exporter.set(metrics.ROLLBACKS, self._rollbacks)
        ranks = distributed.all_gather_object(
            {"host": socket.gethostname(), "pid": os.getpid(), "metrics": self._address()}
        )
        distributed.run_on_main(self._count_stalls)
        if self._world.is_main:
            self._on_begin(_reachable(ranks))
        named = dict(zip(self._sources, samples, strict=False)) if len(samples) > 1 else {}
        self._write_event(
            "resume" if step else "start",
            attempt=self._attempt,
            step=step,
            total_steps=total_steps,
            world_size=self._world.world_size,
            ranks=ranks,
            manifest_fingerprint=manifest_fingerprint,
            eval_fingerprint=eval_fingerprint,
            config_fingerprint=self._config.fingerprint,
            versions=versions,
            **({"sources": named} if named else {}),
        )
        if self._world.is_main:
            self._record_size()

    def _record_size(self) -> None:
        """Record the number of ranks, and a resize if the attempt before this had another one."""
        size, before = self._world.world_size, _latest_size(self._past)
        resizes = sum(event["event"] == "resize" for event in self._past)
        if before not in (0, size):
            resizes += 1
            change = {"from": before, "to": size, "reason": _reason_to_resize(self._past)}
            self._journal.write_event("resize", **change)
        self._exporter.set(metrics.WORLD_SIZE, size)
        self._exporter.set(metrics.RESIZES, resizes)

    def _address(self) -> str:
        """Return the address of this rank's metrics for other hosts, "" if they are not served."""
        host, _, port = self._exporter.address.rpartition(":")
        return f"{socket.gethostname()}:{port}" if host in _ANY_HOST else self._exporter.address

    def record_ready(self) -> None:
        """Record that the set-up is done: from now on time belongs to steps."""
        self._write_event("ready")
        self.meter.window()

    def record_first_step(self, step: int, seconds: Mapping[str, float]) -> None:
        """Record how long the attempt took to its first step.

        Args:
            step: Number of the step, from 1.
            seconds: By phase; see `restart`.
        """
        self._journal.write_event(FIRST_STEP, step=step, seconds=dict(seconds))
        for phase, amount in seconds.items():
            self._exporter.set(metrics.START_SECONDS, amount, phase=phase)

    def _write_event(self, event: str, **fields: Any) -> None:
        """Write an event that takes part in the goodput."""
        self._goodput.add(self._journal.write_event(event, **fields))

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

    def record_validation(
        self, step: int, metric: str, score: float, samples: int, bad: int, is_best: bool
    ) -> None:
        """Record the score of a fine-tuning's validation samples.

        Args:
            step: Completed optimizer steps.
            metric: Name of the score.
            score: From 0 to 1 for a classification.
            samples: How many count.
            bad: How many could not be read.
            is_best: Whether it is the best so far.
        """
        fields = {"samples": samples, "bad_samples": bad, "is_best": is_best}
        self._journal.write_event("validation", step=step, metric=metric, score=score, **fields)
        if self._world.is_main:
            log.info("Validation after step %d: %s %.4f.", step, metric.upper(), score)
            self._exporter.set(metrics.VALIDATION_SCORE, score, score=metric)

    def record_probe(self, step: int, uar: Mapping[str, float], **fields: Any) -> None:
        """Record how well simple classifiers read labels from frozen features.

        Args:
            step: Completed optimizer steps.
            uar: From 0 to 1, by classifier.
            **fields: Further fields of the event.
        """
        self._journal.write_event("probe", step=step, uar=dict(uar), **fields)
        if self._world.is_main:
            for classifier, value in uar.items():
                self._exporter.set(metrics.PROBE_UAR, value, classifier=classifier)

    def record_probe_failure(self, step: int, error: str) -> None:
        """Record that a probe failed; training continues.

        Args:
            step: Completed optimizer steps.
            error: What was wrong.
        """
        self._journal.write_event("probe_failed", step=step, error=error)
        if self._world.is_main:
            self._exporter.add(metrics.PROBE_FAILURES, 1)

    def add_probe_seconds(self, seconds: float) -> None:
        """Count time in which training waited for a probe, which is not time of its steps.

        Args:
            seconds: Wall time.
        """
        self._probe_seconds += seconds
        self.meter.leave_out(seconds)
        if self._world.is_main:
            self._exporter.set(metrics.PROBE_SECONDS, seconds)

    def record_test(self, step: int, num_samples: int, scores: Mapping[str, float]) -> None:
        """Record the scores of a tested task.

        Args:
            step: Completed optimizer steps.
            num_samples: Samples tested.
            scores: By name.
        """
        self._journal.write_event("test", step=step, samples=num_samples, scores=dict(scores))

    def record_profile(self, stored: StoredTrace) -> None:
        """Record that steps were traced.

        Args:
            stored: Where the trace of this rank is.
        """
        fields = dataclasses.asdict(stored)
        self._journal.write_event("profile", step=fields.pop("last"), **fields)

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

    def record_checkpoint(self, step: int, num_bytes: int, seconds: float, error: str) -> None:
        """Record how the upload of a checkpoint ended.

        Args:
            step: Step of the checkpoint.
            num_bytes: Bytes of its files.
            seconds: Time from the start of saving to its commit.
            error: "" if it is committed.
        """
        if error:
            self._journal.write_event("checkpoint_failed", step=step, error=error)
            self._exporter.add(metrics.CHECKPOINT_FAILURES, 1)
            return
        self._journal.write_event("checkpoint", step=step, seconds=seconds, bytes=num_bytes)
        self._exporter.set(metrics.CHECKPOINT_STEP, step)
        self._exporter.set(metrics.CHECKPOINT_TIME, time.time())
        self._exporter.set(metrics.CHECKPOINT_COMMIT_SECONDS, seconds)
        self._exporter.set(metrics.CHECKPOINT_BYTES, num_bytes)

    def record_stop(self, step: int, reason: str, message: str = "") -> None:
        """Record why the attempt ends.

        Args:
            step: Completed optimizer steps.
            reason: "finished", a signal's name or an error's.
            message: Message of an error.
        """
        self._write_event("stop", step=step, reason=reason, message=message)

    def record_failure(self, step: int, failure: str) -> None:
        """Store an error of this rank alone, so that a later attempt recognizes it.

        Args:
            step: Completed optimizer steps.
            failure: The error as one line.
        """
        if self._world.is_main:  # its stop event has it
            return
        try:
            write_failure(self._config.run.url, self._world.rank, step, failure)
        except storage.StorageError as error:
            log.warning("The failure of rank %d is not stored: %s", self._world.rank, error)

    def record_stall(self, report: dict[str, Any]) -> None:
        """Record that the attempt ends because a rank has stalled.

        Args:
            report: Fields of the event; "attempt" is the number of the stalled attempt.
        """
        self._journal.write_event(STALL, **report)
        self._journal.sync()

    def _count_stalls(self) -> None:
        """Add the stalls that their attempts could not record, and count all (rank 0)."""
        url = storage.join(self._config.run.url, STALLS_FOLDER)
        recorded = [
            e.get("stacks", "").rpartition("/")[2] for e in self._past if e["event"] == STALL
        ]
        for name in sorted(set(storage.list_folders(url)) - {*recorded}):
            with contextlib.suppress(storage.StorageMissingError):  # the rank died while it wrote
                report = json.loads(storage.read_bytes(storage.join(url, name, STALL_FILE)))
                self.record_stall(report)
                recorded.append(name)
        self._exporter.set(metrics.STALLS, len(recorded))

    def expose_end_not_finite(self) -> None:
        """Show that the run ended not finite, and wait until Prometheus may have scraped it."""
        self._exporter.set(metrics.ENDED_NOT_FINITE, 1)
        time.sleep(self._config.metrics.linger_seconds)

    def record_change(self, step: int, key: str, before: Any, now: Any) -> None:
        """Record that the attempt continues with another value of a key.

        Args:
            step: Completed optimizer steps.
            key: section.name.
            before: The value until then.
            now: The value from then on.
        """
        self._journal.write_event("change", step=step, key=key, **{"from": before, "to": now})

    def record_skip(self, **fields: Any) -> None:
        """Record an update that was left out.

        Args:
            **fields: step, part (loss or gradient), keys of clips and their number.
        """
        self._journal.write_event("skip", **fields)
        if self._world.is_main:  # all ranks have seen it
            self._exporter.add(metrics.NON_FINITE, 1)

    def record_spike(self, **fields: Any) -> None:
        """Record a spike of the loss.

        Args:
            **fields: step, loss, median and zscore.
        """
        self._journal.write_event("spike", **fields)
        if self._world.is_main:
            self._exporter.add(metrics.LOSS_SPIKES, 1)

    def record_rollback(self, step: int, to: int, passed_over: Sequence[int], reason: str) -> None:
        """Record that the run returns to a checkpoint, and store it before it does; a collective.

        Args:
            step: The last step that was taken.
            to: Step of the checkpoint; 0: the run begins again.
            passed_over: Steps that are passed over from now on.
            reason: What happened at which step.
        """
        fields = {"from": step, "to": to, "passed_over": list(passed_over), "reason": reason}
        self._journal.write_event("rollback", **fields)
        if self._world.is_main:
            self._exporter.set(metrics.ROLLBACKS, self._rollbacks + 1)
        distributed.run_on_all_ranks(self.sync)

    def losses(self) -> tuple[list[float], list[float]]:
        """Return training and held-out losses of the whole run so far, in order (rank 0)."""
        events = self._journal.read_lines(EVENTS_FILE)
        return (
            [_number(row["loss"]) for row in self._journal.read_lines(METRICS_FILE)],
            [_number(event["held_out_loss"]) for event in events if event["event"] == "eval"],
        )


def _number(value: float | None) -> float:
    """Return a number of a JSON file, in which one that is not finite is null."""
    return math.nan if value is None else value


def _latest_size(events: list[Row]) -> int:
    """Return the number of ranks of the newest attempt in a run's events, 0 if there is none."""
    sizes = [event["world_size"] for event in events if "world_size" in event]
    return sizes[-1] if sizes else 0


def _reason_to_resize(events: list[Row]) -> str:
    """Return why the newest attempt in a run's events ended: its stop reason, or "failure"."""
    ends = [e for e in events if e["event"] in (*BEGINNINGS, "stop")]
    is_orderly = ends[-1]["event"] == "stop" and not ends[-1].get("message")
    return ends[-1]["reason"] if is_orderly else "failure"


def _reachable(ranks: list[dict[str, Any]]) -> list[str]:
    """Return the metrics addresses of ranks that rank 0's host can reach; log which it cannot.

    The loopback address of another host is the scraper's own: equal ports of several hosts would
    be one rank's metrics under several names.
    """
    served = [rank for rank in ranks if rank["metrics"]]
    hidden = {
        rank["host"]
        for rank in served
        if rank["host"] != ranks[0]["host"] and rank["metrics"].startswith(_LOOPBACK)
    }
    if hidden:
        log.warning(
            "Metrics of the ranks on %s are served on their loopback interface and not listed: "
            "set metrics.host=0.0.0.0 in a network that you trust.",
            ", ".join(sorted(hidden)),
        )
    return [rank["metrics"] for rank in served if rank["host"] not in hidden]


def _like(own: float, combined: float) -> float:
    """Return a combined value as a whole number where this rank's is one: bytes, clips."""
    return int(combined) if isinstance(own, int) and combined.is_integer() else combined
