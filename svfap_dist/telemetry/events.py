"""Record what happens to a run: events in its journal, and metrics at /metrics.

In: starts, scores, checkpoints, faults, as they occur. Out: lines of events.jsonl (rank 0), from
which the run's goodput is computed, numbers at this rank's /metrics, and what trackers get.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from svfap_dist import distributed, storage
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.profiling.trace import StoredTrace
from svfap_dist.telemetry import metrics
from svfap_dist.telemetry.exporter import Exporter
from svfap_dist.telemetry.goodput import BEGINNINGS, Goodput
from svfap_dist.telemetry.journal import (
    EVENTS_FILE,
    METRICS_FILE,
    STALL_FILE,
    STALLS_FOLDER,
    Journal,
    write_failure,
)
from svfap_dist.telemetry.restart import FIRST_STEP
from svfap_dist.telemetry.tracking import Tracking

log = logging.getLogger(__name__)
Row = dict[str, Any]
_STALL = "stall"
_LOOPBACK = ("127.", "localhost:", "::1:")
_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 - to listen on; not an address to connect to


class EventRecorder:
    """Records the events of one rank's attempt; `Recorder` adds windows and opens the files.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.
        attempt: Number of the attempt, from 1.
        on_begin: Called with all ranks' metrics addresses, on rank 0.
        exporter: This rank's metrics.
        journal: The run's files.
        tracking: The trackers, on rank 0; None: there are none.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        attempt: int,
        on_begin: Callable[[list[str]], None],
        exporter: Exporter,
        journal: Journal,
        tracking: Tracking | None,
    ) -> None:
        self._config, self._world, self._attempt = config, world, attempt
        self._on_begin, self._exporter, self._journal = on_begin, exporter, journal
        self._tracking, self._sources = tracking, config.data.labels
        self._past = journal.read_lines(EVENTS_FILE) if world.is_main else []
        self._goodput = Goodput(self._past)
        self._rollbacks = sum(event["event"] == "rollback" for event in self._past)

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
            samples: Number of training samples of each data set; recorded for a mixture only.
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
        self._journal.write_event(_STALL, **report)
        self._journal.sync()

    def _count_stalls(self) -> None:
        """Add the stalls that their attempts could not record, and count all (rank 0)."""
        url = storage.join(self._config.run.url, STALLS_FOLDER)
        recorded = [
            e.get("stacks", "").rpartition("/")[2] for e in self._past if e["event"] == _STALL
        ]
        for name in sorted(set(storage.list_folders(url)) - {*recorded}):
            with contextlib.suppress(storage.StorageMissingError):  # the rank died while it wrote
                report = json.loads(storage.read_bytes(storage.join(url, name, STALL_FILE)))
                self.record_stall(report)
                recorded.append(name)
        self._exporter.set(metrics.STALLS, len(recorded))

    def expose_end_not_finite(self) -> None:
        """Report that the run ended with a value that is not finite, and wait for a scrape."""
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

    A scraper takes a loopback address for its own host: ranks of several hosts on the same port
    would all show one rank's metrics.
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
