"""Long disturbed runs: many kills one after another, and goodput with a kill every few minutes."""

from __future__ import annotations

import dataclasses
import statistics
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from faults import Row, Stage
from observed_run import Line, ObservedRun, phases_of

from svfap_dist.telemetry.goodput import WINDOW
from svfap_dist.telemetry.journal import EVENTS_FILE
from svfap_dist.telemetry.metrics import GOODPUT

_ENDLESS = ("train.max_steps=1000000", "train.epochs=1000000", "cluster.max_failures=-1")


@dataclasses.dataclass(frozen=True)
class Kills:
    """Seconds from each of many kills to the next step beyond, and of which phases they are."""

    row: Row
    seconds: list[float]
    phases: dict[str, float]  # median seconds of each that the run's events name

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        kills = f"{len(self.seconds)} kills: median {statistics.median(self.seconds):.1f} s"
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return [f"{kills}, worst {max(self.seconds):.1f} s.", f"Median by phase: {phases}."]


def kill_often(stage: Stage, count: int) -> Kills:
    """Kill a random rank of one run again and again, 15 to 25 s after each recovery.

    By then each host of the group has its standby processes again.

    Args:
        stage: Where it runs.
        count: Number of kills.
    """
    draws, times = stage.random("kills"), []
    with stage.running("kills", *_ENDLESS) as run:
        run.wait_for_step(1)
        for _ in range(count):
            run.watch(draws.uniform(15.0, 25.0))
            times.append(time.time())
            run.kill_rank(draws.randrange(2))
            run.wait_until(lambda: run.recoveries(times)[-1].restored, "recovery")
        run.stop()
        recoveries = run.recoveries(times)
        row = stage.row(run, "kills", times, must_restart=True, same_losses=False, steps=1)
    seconds = [each.restored for each in recoveries if each.restored is not None]
    return Kills(row, seconds, _phases(run.events()))


def _phases(events: Sequence[Line]) -> dict[str, float]:
    """Median seconds of each phase of the restarts."""
    tables = [table for table in map(phases_of, events) if "noticed" in table]
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: statistics.median(table.get(name, 0.0) for table in tables) for name in names}


@dataclasses.dataclass(frozen=True)
class MeasuredGoodput:
    """Goodput of a run that was killed every few minutes: exported, and by its events."""

    row: Row
    minutes: float
    kills: int
    exported: float
    recomputed: float
    shares: dict[str, float]  # of the wall time, by what it was spent on

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        return [
            f"{self.kills} kills in {self.minutes:.0f} minutes: goodput {self.recomputed:.2%} by "
            f"the events, {self.exported:.2%} exported.",
            f"Wall time: {shares}.",
        ]


def measure_goodput(stage: Stage, minutes: float, every: float = 5.0) -> MeasuredGoodput:
    """Train for some minutes with a kill in the middle of each interval.

    Args:
        stage: Where it runs.
        minutes: Length of the run, from its first step.
        every: Minutes of an interval.
    """
    draws, times = stage.random("goodput"), []
    # Steps of compute rather than of Python, checkpoints of about ten seconds.
    size = ("model.size=tiny", "data.num_frames=16", "train.log_every=5")
    steps = (*size, "train.checkpoint_every=50", "data.prefetch_bytes=100000000")
    with stage.running("goodput", *_ENDLESS, *steps, "metrics.host=0.0.0.0") as run:
        run.wait_for_step(1)
        began = time.monotonic()
        for number in range(round(minutes / every)):
            run.watch(began + (number + 0.5) * every * 60 - time.monotonic())
            times.append(time.time())
            run.kill_rank(draws.randrange(2))
        run.watch(began + minutes * 60 - time.monotonic())
        exported, at = _exported(stage, run), time.time()
        run.stop()
        row = stage.row(run, "goodput", times, must_restart=True, same_losses=False, steps=1)
        shares = shares_of(run.stored_lines(EVENTS_FILE), at)
    difference = abs(exported - shares["steps"])
    assert difference <= 0.01, f"{exported:.2%} exported, {shares['steps']:.2%} by the events"
    return MeasuredGoodput(row, minutes, len(times), exported, shares["steps"], shares)


def _exported(stage: Stage, run: ObservedRun) -> float:
    """The gauge of rank 0, as Prometheus reads it."""
    host, _, port = run.ranks()[0]["metrics"].rpartition(":")
    address = stage.cluster.hosts.hosts[host]
    with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{GOODPUT.name}{{"))


def shares_of(events: Sequence[dict[str, Any]], until: float) -> dict[str, float]:
    """Shares of the wall time up to a moment, computed apart from `telemetry.goodput`.

    A window counts as steps if no later attempt began before its last step, less the time in it
    that was spent on something else; all time outside of windows is that of starts.
    """
    events = [event for event in events if event["time"] <= until]
    first, last = events[0]["time"], max(e["time"] for e in events if e["event"] == WINDOW)
    seconds = dict.fromkeys(("steps", "data", "checkpoints", "repeated", "restarts"), 0.0)
    begun = first
    for number, event in enumerate(events):
        if event["event"] not in ("ready", WINDOW):
            continue
        length, begun = event["time"] - begun, event["time"]
        if event["event"] == "ready":
            continue
        later = (e["step"] for e in events[number:] if e["event"] == "resume")
        if min(later, default=event["step"]) < event["step"]:
            seconds["repeated"] += length
            continue
        seconds["data"] += event["data_wait_seconds"]
        seconds["checkpoints"] += event["checkpoint_seconds"]
        others = event["data_wait_seconds"] + event["checkpoint_seconds"]
        seconds["steps"] += length - others - event["evaluation_seconds"]
    seconds["restarts"] = last - first - sum(seconds.values())
    return {name: amount / (last - first) for name, amount in seconds.items()}
