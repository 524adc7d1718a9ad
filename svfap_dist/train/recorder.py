"""What is told of a run while it goes: a rank's meter, journal and metrics endpoint, fed together.

In: batches, losses, outcomes, as they come. Out: lines in the files of the run (rank 0, and each
rank its ledger), numbers at each rank's /metrics, and rows for whoever watches.
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
from svfap_dist.metrics import names
from svfap_dist.metrics.exporter import Exporter
from svfap_dist.metrics.meter import Meter
from svfap_dist.train import state as train_state
from svfap_dist.train.checkpointer import Outcome
from svfap_dist.train.journal import EVENTS, METRICS, Journal

Row = dict[str, Any]
_SHOWN = {  # gauges and the fields of a row that they show
    "step": names.STEP,
    "epoch": names.EPOCH,
    "loss": names.LOSS,
    "lr": names.LEARNING_RATE,
    "grad_norm": names.GRAD_NORM,
    "time": names.LAST_STEP_TIME,
}


class Recorder:
    """Records of one rank's attempt; made and closed by all ranks together.

    Args:
        attempt, step: number of the attempt and completed steps at which it goes on.
        on_log: gets each row of metrics, on rank 0.

    Raises: ClusterError, StorageError: on every rank, if port or files are refused on any.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        attempt: int,
        step: int,
        on_log: Callable[[Row], None],
    ) -> None:
        self._config, self._world, self._attempt = config, world, attempt
        self._on_log = on_log
        self._bad: list[Row] = []  # bad samples that are not yet in the quarantine list
        self.meter = Meter()
        with contextlib.ExitStack() as stack:
            self._exporter = distributed.together(
                lambda: Exporter(config.metrics, config.run.name, world.rank, world.local_rank)
            )
            stack.callback(self._exporter.close)
            journal = distributed.together(lambda: Journal(config, world.rank, attempt, step))
            self._journal = stack.enter_context(journal)
            self._closing = stack.pop_all()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def sync(self) -> None:
        """Bring the files of the run to the store; may be called from any thread."""
        self._journal.sync()

    def begin(self, step: int, total_steps: int, manifest_fingerprint: str) -> None:
        """Tell that the attempt starts or resumes; all ranks call it together."""
        self._exporter.set(names.STEP, step)
        self._exporter.set(names.CHECKPOINT_STEP, step)
        self._exporter.set(names.RESTARTS, self._attempt - 1)
        self._journal.event(
            "resume" if step else "start",
            attempt=self._attempt,
            step=step,
            total_steps=total_steps,
            world_size=self._world.world_size,
            ranks=distributed.gathered(
                {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "metrics": self._exporter.address,
                }
            ),
            manifest_fingerprint=manifest_fingerprint,
            config_fingerprint=self._config.fingerprint,
            versions=train_state.versions(),
        )

    def count(self, step: int, epoch: int, batch: ClipBatch) -> None:
        """Book this rank's batch of a step."""
        self.meter.step(
            len(batch.frames),
            batch.fetch_seconds,
            batch.decode_seconds,
            batch.bytes_fetched,
            batch.batches_ready,
        )
        for bad in batch.bad:
            self._bad.append({"step": step, **dataclasses.asdict(bad)})
            self._exporter.add(names.BAD_SAMPLES, 1, reason=bad.reason)
        self._journal.ledger(
            {"epoch": epoch, "step": step, "lane": lane, "key": key, "substituted": substituted}
            for lane, key, substituted in zip(
                batch.lanes, batch.keys, batch.substituted, strict=True
            )
        )

    def log(self, numbers: Row) -> None:
        """Write and show the numbers of a log step, with the throughput since the last one.

        All ranks call it together. Waits and batches ready are the slowest rank's, since all wait
        for it; clips, bytes, times of threads and bad samples are summed over the ranks.
        """
        window = self.meter.window()
        windows = distributed.gathered(window)
        seconds = max(each.seconds for each in windows)
        waited = max(each.data_wait_seconds for each in windows)
        row = {
            **numbers,
            "clips_per_second": sum(each.clips for each in windows) / seconds,
            "data_wait_seconds": waited,
            "data_wait_share": waited / seconds,
            "fetch_seconds": sum(each.fetch_seconds for each in windows),
            "decode_seconds": sum(each.decode_seconds for each in windows),
            "bytes_fetched": sum(each.bytes_fetched for each in windows),
            "batches_ready": min(each.batches_ready for each in windows),
            "bad_samples": self.write_quarantine(),
            "time": time.time(),
        }
        for field, metric in _SHOWN.items():
            self._exporter.set(metric, row[field])
        self._exporter.add(names.CLIPS, window.clips)
        self._exporter.add(names.STEP_SECONDS, window.seconds)
        self._exporter.add(names.DATA_WAIT_SECONDS, window.data_wait_seconds)
        self._exporter.add(names.FETCH_SECONDS, window.fetch_seconds)
        self._exporter.add(names.DECODE_SECONDS, window.decode_seconds)
        self._exporter.add(names.FETCHED_BYTES, window.bytes_fetched)
        self._exporter.set(names.BATCHES_READY, window.batches_ready)
        self._journal.metrics(row)
        if self._world.is_main:
            self._on_log(row)

    def write_quarantine(self) -> int:
        """Write all ranks' new bad samples and return their number; all ranks call it together."""
        rows = [row for found in distributed.gathered(self._bad) for row in found]
        for row in rows:
            self._journal.quarantine(row)
        self._bad = []
        return len(rows)

    def evaluated(self, step: int, held_out_loss: float) -> None:
        """Tell a held-out loss."""
        self._journal.event("eval", step=step, held_out_loss=held_out_loss)
        self._exporter.set(names.HELD_OUT_LOSS, held_out_loss)

    def stood_still(self, seconds: float) -> None:
        """Count time that training stood still for checkpoints."""
        self._exporter.add(names.CHECKPOINT_SECONDS, seconds)

    def checkpointed(self, outcome: Outcome) -> None:
        """Tell how the upload of a checkpoint ended."""
        if outcome.error:
            self._journal.event("checkpoint_failed", step=outcome.step, error=outcome.error)
            self._exporter.add(names.CHECKPOINT_FAILURES, 1)
            return
        self._journal.event(
            "checkpoint", step=outcome.step, seconds=outcome.seconds, bytes=outcome.num_bytes
        )
        self._exporter.set(names.CHECKPOINT_STEP, outcome.step)

    def ended(self, step: int, reason: str, message: str = "") -> None:
        """Tell why the attempt ends: "finished", a signal's name or an error's."""
        self._journal.event("stop", step=step, reason=reason, message=message)

    def losses(self) -> tuple[list[float], list[float]]:
        """Training and held-out losses of the whole run so far, in order (rank 0)."""
        events = self._journal.lines(EVENTS)
        return (
            [row["loss"] for row in self._journal.lines(METRICS)],
            [event["held_out_loss"] for event in events if event["event"] == "eval"],
        )
