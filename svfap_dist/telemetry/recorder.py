"""What is told of a run while it goes: a rank's meter, journal and metrics endpoint, fed together.

In: batches, losses, outcomes, as they come. Out: lines in the files of the run (rank 0, and each
rank its ledger), numbers at each rank's /metrics, and rows for whoever watches. A window is the
time between two log steps or checkpoints; its event says what the time went into, so that the
run's goodput can be told from the events alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from svfap_dist import distributed
from svfap_dist.config import Config
from svfap_dist.data.clips import ClipBatch
from svfap_dist.distributed import World
from svfap_dist.telemetry import gpu
from svfap_dist.telemetry import metrics as names
from svfap_dist.telemetry.exporter import Exporter
from svfap_dist.telemetry.goodput import CLASSES, WINDOW, Goodput
from svfap_dist.telemetry.journal import EVENTS, METRICS, Journal
from svfap_dist.telemetry.meter import Meter, Window

Row = dict[str, Any]
_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 - listened on, maybe, but no address to ask
_SHOWN = {  # gauges and the fields of a row that they show
    "step": names.STEP,
    "epoch": names.EPOCH,
    "loss": names.LOSS,
    "lr": names.LEARNING_RATE,
    "grad_norm": names.GRAD_NORM,
    "time": names.LAST_STEP_TIME,
    "clips_per_second": names.CLIPS_PER_SECOND,
}


class Recorder:
    """Records of one rank's attempt; made and closed by all ranks together.

    Args:
        attempt, step: number of the attempt and completed steps at which it goes on.
        work: operations and tokens of a clip in a training step. peak_rate: operations that a
            device can do in a second at best; None if unknown.
        on_log: gets each row of metrics, on rank 0. on_begin: gets all ranks' metrics addresses.

    Raises: ClusterError, StorageError: on every rank, if port or files are refused on any.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        attempt: int,
        step: int,
        on_log: Callable[[Row], None],
        on_begin: Callable[[list[str]], None],
        work: tuple[int, int],
        peak_rate: float | None,
    ) -> None:
        self._config, self._world, self._attempt = config, world, attempt
        self._on_log, self._on_begin = on_log, on_begin
        self._flops_per_clip, self._tokens_per_clip = work
        self._peak_rate = peak_rate
        self._windows: list[Window] = []  # of all ranks, since the last log step
        self._saving = self._evaluating = 0.0  # seconds since the last window
        self._bad: list[Row] = []  # bad samples that are not yet in the quarantine list
        self.meter = Meter()
        with contextlib.ExitStack() as stack:
            self._exporter = distributed.run_on_all_ranks(
                lambda: Exporter(config.metrics, config.run.name, world.rank, world.local_rank)
            )
            stack.callback(self._exporter.close)
            journal = distributed.run_on_all_ranks(
                lambda: Journal(config, world.rank, attempt, step)
            )
            self._journal = stack.enter_context(journal)
            self._goodput = Goodput(journal.lines(EVENTS) if world.is_main else [])
            self._closing = stack.pop_all()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def sync(self) -> None:
        """Bring the files of the run to the store; may be called from any thread."""
        self._journal.sync()

    def begin(
        self, step: int, total_steps: int, manifest_fingerprint: str, versions: dict[str, str]
    ) -> None:
        """Tell that the attempt starts or resumes; all ranks call it together."""
        self._exporter.set(names.STEP, step)
        self._exporter.set(names.CHECKPOINT_STEP, step)
        self._exporter.set(names.RESTARTS, self._attempt - 1)
        ranks = distributed.all_gather_object(
            {"host": socket.gethostname(), "pid": os.getpid(), "metrics": self._address()}
        )
        if self._world.is_main:
            self._on_begin([rank["metrics"] for rank in ranks if rank["metrics"]])
        self._book(
            "resume" if step else "start",
            attempt=self._attempt,
            step=step,
            total_steps=total_steps,
            world_size=self._world.world_size,
            ranks=ranks,
            manifest_fingerprint=manifest_fingerprint,
            config_fingerprint=self._config.fingerprint,
            versions=versions,
        )

    def _address(self) -> str:
        """Where others find this rank's metrics, "" if nowhere."""
        host, _, port = self._exporter.address.rpartition(":")
        return f"{socket.gethostname()}:{port}" if host in _ANY_HOST else self._exporter.address

    def ready(self) -> None:
        """Tell that all is set up: from now on time belongs to steps."""
        self._book("ready")
        self.meter.window()

    def _book(self, event: str, **fields: Any) -> None:
        """Write an event of which the goodput is made."""
        self._goodput.add(self._journal.event(event, **fields))

    def count(self, step: int, epoch: int, batch: ClipBatch) -> None:
        """Book this rank's batch of a step."""
        self.meter.step(
            len(batch.frames),
            batch.fetch_seconds,
            batch.decode_seconds,
            batch.bytes_fetched,
            batch.batches_ready,
        )
        self._exporter.add(names.TOKENS, len(batch.frames) * self._tokens_per_clip)
        self._exporter.add(names.FLOPS, len(batch.frames) * self._flops_per_clip)
        for bad in batch.bad:
            self._bad.append({"step": step, **dataclasses.asdict(bad)})
            self._exporter.add(names.BAD_SAMPLES, 1, reason=bad.reason)
        self._journal.ledger(
            {"epoch": epoch, "step": step, "lane": lane, "key": key, "substituted": substituted}
            for lane, key, substituted in zip(
                batch.lanes, batch.keys, batch.substituted, strict=True
            )
        )

    def close_window(self, step: int) -> None:
        """Book the time up to this completed step; all ranks call it together.

        Waits and batches ready are the slowest rank's, since all wait for it; clips, bytes and
        times of threads are summed over the ranks.
        """
        window = self.meter.window()
        self._exporter.add(names.CLIPS, window.clips)
        self._exporter.add(names.STEP_SECONDS, window.seconds)
        self._exporter.add(names.DATA_WAIT_SECONDS, window.data_wait_seconds)
        self._exporter.add(names.FETCH_SECONDS, window.fetch_seconds)
        self._exporter.add(names.DECODE_SECONDS, window.decode_seconds)
        self._exporter.add(names.FETCHED_BYTES, window.bytes_fetched)
        if window.steps:
            self._exporter.set(names.BATCHES_READY, window.batches_ready)
        ranks = distributed.all_gather_object(window)
        whole = Window(
            steps=window.steps,
            clips=sum(each.clips for each in ranks),
            seconds=max(each.seconds for each in ranks),
            data_wait_seconds=max(each.data_wait_seconds for each in ranks),
            fetch_seconds=sum(each.fetch_seconds for each in ranks),
            decode_seconds=sum(each.decode_seconds for each in ranks),
            bytes_fetched=sum(each.bytes_fetched for each in ranks),
            batches_ready=min(each.batches_ready for each in ranks),
        )
        self._windows.append(whole)
        self._book(
            WINDOW,
            step=step,
            data_wait_seconds=whole.data_wait_seconds,
            checkpoint_seconds=self._saving,
            evaluation_seconds=self._evaluating,
        )
        self._saving = self._evaluating = 0.0

    def log(self, numbers: Row, phase_seconds: dict[str, float]) -> None:
        """Write and show the numbers of a log step, with the throughput since the last one.

        phase_seconds: of this rank. All ranks call it together.
        """
        self.close_window(numbers["step"])
        windows, self._windows = self._windows, []
        seconds = sum(each.seconds for each in windows)
        waited = sum(each.data_wait_seconds for each in windows)
        row = {
            **numbers,
            "clips_per_second": sum(each.clips for each in windows) / seconds,
            "data_wait_seconds": waited,
            "data_wait_share": waited / seconds,
            "fetch_seconds": sum(each.fetch_seconds for each in windows),
            "decode_seconds": sum(each.decode_seconds for each in windows),
            "bytes_fetched": sum(each.bytes_fetched for each in windows),
            "batches_ready": min(each.batches_ready for each in windows if each.steps),
            "bad_samples": self.write_quarantine(),
            "time": time.time(),
        }
        self._show(row, phase_seconds)
        self._journal.metrics(row)
        if self._world.is_main:
            self._on_log(row)

    def _show(self, row: Row, phase_seconds: dict[str, float]) -> None:
        for field, metric in _SHOWN.items():
            self._exporter.set(metric, row[field])
        for phase, seconds in phase_seconds.items():
            self._exporter.add(names.PHASE_SECONDS, seconds, phase=phase)
        for metric, value in gpu.readings().items():
            self._exporter.set(metric, value)
        if self._peak_rate is not None:
            rate = row["clips_per_second"] * self._flops_per_clip / self._world.world_size
            self._exporter.set(names.MFU, rate / self._peak_rate)
        if self._world.is_main:  # the others do not see the run's events
            self._exporter.set(names.GOODPUT, self._goodput.ratio())
            seconds_of = self._goodput.seconds()
            for name in CLASSES:
                self._exporter.set(names.RUN_SECONDS, seconds_of[name], **{"class": name})

    def write_quarantine(self) -> int:
        """Write all ranks' new bad samples and return their number; all ranks call it together."""
        rows = [row for found in distributed.all_gather_object(self._bad) for row in found]
        for row in rows:
            self._journal.quarantine(row)
        self._bad = []
        return len(rows)

    def evaluated(self, step: int, held_out_loss: float, seconds: float) -> None:
        """Tell a held-out loss, and how long it took to compute."""
        self._evaluating += seconds
        self._journal.event("eval", step=step, held_out_loss=held_out_loss)
        self._exporter.set(names.HELD_OUT_LOSS, held_out_loss)

    def tested(self, seconds: float) -> None:
        """Count time that testing took."""
        self._evaluating += seconds

    def stood_still(self, seconds: float) -> None:
        """Count time that training stood still for checkpoints."""
        self._saving += seconds
        self._exporter.add(names.CHECKPOINT_SECONDS, seconds)

    def checkpointed(self, step: int, num_bytes: int, seconds: float, error: str) -> None:
        """Tell how the upload of a checkpoint ended."""
        if error:
            self._journal.event("checkpoint_failed", step=step, error=error)
            self._exporter.add(names.CHECKPOINT_FAILURES, 1)
            return
        self._journal.event("checkpoint", step=step, seconds=seconds, bytes=num_bytes)
        self._exporter.set(names.CHECKPOINT_STEP, step)
        self._exporter.set(names.CHECKPOINT_TIME, time.time())
        self._exporter.set(names.CHECKPOINT_COMMIT_SECONDS, seconds)
        self._exporter.set(names.CHECKPOINT_BYTES, num_bytes)

    def ended(self, step: int, reason: str, message: str = "") -> None:
        """Tell why the attempt ends: "finished", a signal's name or an error's."""
        self._book("stop", step=step, reason=reason, message=message)

    def not_finite(self) -> None:
        """Tell of a loss or gradient that ends the run, for as long as a scrape may take."""
        self._exporter.add(names.NON_FINITE, 1)
        time.sleep(self._config.metrics.linger_seconds)

    def losses(self) -> tuple[list[float], list[float]]:
        """Training and held-out losses of the whole run so far, in order (rank 0)."""
        events = self._journal.lines(EVENTS)
        return (
            [row["loss"] for row in self._journal.lines(METRICS)],
            [event["held_out_loss"] for event in events if event["event"] == "eval"],
        )
