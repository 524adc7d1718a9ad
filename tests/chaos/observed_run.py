"""A run that is disturbed, and what its files say about it.

The driver is `svfap pretrain --on ray` on the head. The run's files are on the store, where they
arrive in intervals, so what happens now is read from the copies that ranks write on their hosts'
disks; those of a killed rank stay there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chaos_cluster import ChaosCluster
from launched_runs import SMALL

from svfap_dist import storage
from svfap_dist.checkpoint import store
from svfap_dist.telemetry.goodput import WINDOW
from svfap_dist.telemetry.journal import EVENTS_FILE, METRICS_FILE
from svfap_dist.train.audit import Audit, audit

STEPS, CHECKPOINT_EVERY = 240, 20
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 400.0  # for what takes a tenth of it on an idle machine
# Events by which the run itself says that something is wrong.
_BEGINNINGS = ("start", "resume")
_NOTICES = ("stall", "skip", "rollback", "resize", "checkpoint_failed", *_BEGINNINGS)
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What a fault cost, in seconds since then.

    noticed: until the first event about it; None: there is none. restored: until the first
    completed step beyond those that were completed before; None: the run did not restart. redone:
    steps that were repeated. pause: longest time between two steps after the fault.
    """

    noticed: float | None
    restored: float | None
    redone: int
    pause: float


class ObservedRun:
    """One run on the cluster: start its driver, watch its steps, judge its files.

    Args:
        cluster: Where it runs.
        name: Of the run's folder on the store, and of its log.
        overrides: Keys of the recipe.
        data: URL of the shards; empty: the cluster's good ones.
    """

    def __init__(self, cluster: ChaosCluster, name: str, *overrides: str, data: str = "") -> None:
        self.url = f"s3://chaos/runs/{name}"
        self._cluster = cluster
        self._log = cluster.folder / "logs" / f"{name}.log"
        self._overrides = [
            *SMALL,
            f"data.url={data or cluster.shards}",
            f"run.url={self.url}",
            f"train.max_steps={STEPS}",
            f"train.checkpoint_every={CHECKPOINT_EVERY}",
            "cluster.num_workers=2",
            "cluster.max_failures=10",
            *overrides,
        ]
        self._driver: subprocess.Popen[str] | None = None
        self._seen: dict[tuple[float, str, int], Line] = {}  # events, also of files that are gone
        self._read: dict[Path, int] = {}  # bytes, by file
        cluster.clean_disks()

    def start(self) -> None:
        """Start the driver; once more after its end, as a scheduler or a user would."""
        hosts = self._cluster.hosts
        with open(self._log, "a") as output:
            self._driver = hosts.launch(
                hosts.head,
                *(sys.executable, "-m", "svfap_dist", "pretrain", "tiny_cpu"),
                *(*self._overrides, "--on", "ray"),
                output=output,
                RAY_ADDRESS=f"{hosts.hosts[hosts.head]}:6379",
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def has_ended(self) -> bool:
        assert self._driver is not None
        return self._driver.poll() is not None

    def wait_for_end(self, seconds: float = _PATIENCE_SECONDS) -> int:
        """Return the driver's exit code."""
        assert self._driver is not None
        deadline = time.monotonic() + seconds
        while self._driver.poll() is None:
            assert time.monotonic() < deadline, f"no end in {seconds} s: {self.log[-2000:]}"
            self.events()  # of ranks whose files may be gone later
            time.sleep(_POLL_SECONDS)
        return self._driver.returncode

    def finish(self) -> None:
        """Wait for the end of a run that must reach its last step."""
        code = self.wait_for_end()
        assert code == 0, f"exit code {code}: {self.log[-3000:]}"

    def stop(self) -> None:
        """Have a run that trains save a checkpoint and end."""
        self.wait_for_step(self.step() + 1)
        self.signal_driver(signal.SIGTERM)
        code = self.wait_for_end()
        assert code == 128 + signal.SIGTERM, f"exit code {code}: {self.log[-3000:]}"

    def signal_driver(self, number: signal.Signals) -> None:
        """Send a signal to the driver."""
        assert self._driver is not None
        nsenter = self._driver.pid
        with open(f"/proc/{nsenter}/task/{nsenter}/children") as children:
            (driver,) = children.read().split()
        os.kill(int(driver), number)

    def end(self) -> None:
        """Kill the driver, if it runs."""
        if self._driver is not None and self._driver.poll() is None:
            self.signal_driver(signal.SIGKILL)
            self._driver.wait()

    def events(self) -> list[Line]:
        """All events so far, in order, those of lost files included."""
        for host in self._cluster.hosts.hosts:
            for path in self._cluster.disk(host).glob("*/lines"):
                try:
                    with open(path, "rb") as file:
                        file.seek(self._read.get(path, 0))
                        whole, newline, _ = file.read().rpartition(b"\n")
                except FileNotFoundError:
                    continue  # its rank has just ended
                self._read[path] = self._read.get(path, 0) + len(whole) + len(newline)
                self._add(whole)
        return sorted(self._seen.values(), key=lambda line: line["time"])

    def stored_lines(self, name: str) -> list[Line]:
        """The lines of one of the run's files on the store."""
        data = storage.read_bytes(storage.join(self.url, name))
        return [json.loads(line) for line in data.splitlines()]

    def _add(self, data: bytes) -> None:
        for text in data.splitlines():
            if b'"event"' not in text:
                continue  # of another file
            line = json.loads(text)
            self._seen[line["time"], line["event"], line.get("step", 0)] = line

    def step(self) -> int:
        """Completed steps of the newest attempt."""
        steps = [line["step"] for line in self.events() if "step" in line]
        return steps[-1] if steps else 0

    def ranks(self) -> list[Line]:
        """Host and process id (on that host) of each rank of the newest attempt."""
        begun = [line for line in self.events() if line["event"] in ("start", "resume")]
        return begun[-1]["ranks"]

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something while the run is under way."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            assert not self.has_ended(), f"ended before {what}: {self.log[-3000:]}"
            assert time.monotonic() < deadline, f"no {what}: {self.log[-3000:]}"
            time.sleep(_POLL_SECONDS)

    def watch(self, seconds: float) -> None:
        """Read the run's events for a while: ranks that end remove their files."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert not self.has_ended(), f"ended meanwhile: {self.log[-3000:]}"
            self.events()
            time.sleep(_POLL_SECONDS)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self._is_training() and self.step() >= step, f"step {step}")

    def wait_for_checkpoint(self) -> None:
        """Wait for the first one: it may take longer than many steps."""
        self.wait_until(
            lambda: any(event["event"] == "checkpoint" for event in self.events()), "a checkpoint"
        )

    def _is_training(self) -> bool:
        kinds = [line["event"] for line in self.events()]
        return bool(kinds) and kinds[-1] in ("window", "checkpoint")

    def kill_rank(self, rank: int) -> None:
        """Kill a rank of the newest attempt by SIGKILL."""
        self.signal(self.ranks()[rank])

    def signal(self, rank: Line, name: str = "KILL") -> None:
        """Send a signal to one of `ranks()`."""
        self._cluster.hosts.on(rank["host"], "kill", "-s", name, str(rank["pid"]))

    def recoveries(self, faults: Sequence[float]) -> list[Recovery]:
        """What faults at these times cost, each by the events between it and the next."""
        if storage.exists(storage.join(self.url, EVENTS_FILE)):
            self._add(storage.read_bytes(storage.join(self.url, EVENTS_FILE)))
        events = sorted(self._seen.values(), key=lambda line: line["time"])
        ends = [*faults[1:], float("inf")]
        return [recovery_of(events, at, end) for at, end in zip(faults, ends, strict=True)]

    def audit(self) -> Audit:
        """Every planned sample against the ledger, as `svfap audit` does."""
        return audit(self.url)

    def losses(self) -> dict[int, float]:
        """Loss by step."""
        return {row["step"]: row["loss"] for row in self.stored_lines(METRICS_FILE)}

    def check_checkpoints(self) -> int:
        """Read every committed checkpoint; return the newest one's step."""
        steps = store.committed_steps(self.url)
        for step in steps:
            store.verify(self.url, step)
        return steps[-1]


def recovery_of(events: Sequence[Line], fault: float, until: float) -> Recovery:
    """What a fault cost, by the events before `until`, all in order of time."""
    before = [event for event in events if event["time"] <= fault]
    after = [event for event in events if fault < event["time"] < until]
    steps = [event for event in after if event["event"] == WINDOW]
    times = [fault, *(event["time"] for event in steps)]
    pause = max((later - now for now, later in itertools.pairwise(times)), default=0.0)
    notices = [time - fault for time in map(_notice, after) if time is not None]
    noticed = min(notices, default=None)
    begun = next((event for event in after if event["event"] in _BEGINNINGS), None)
    if begun is None:
        return Recovery(noticed, None, 0, pause)
    done = [*before, *after[: after.index(begun)]]
    reached = max(event["step"] for event in done if event["event"] == WINDOW)
    beyond = [s["time"] for s in steps if s["time"] > begun["time"] and s["step"] > reached]
    restored = beyond[0] - fault if beyond else None
    return Recovery(noticed, restored, reached - begun["step"], pause)


def phases_of(event: Line) -> dict[str, float]:
    """Seconds of a restart by phase, in the event of its first step; empty for others."""
    return event["seconds"] if event["event"] == "first_step" else {}


def _notice(event: Line) -> float | None:
    """When an event says that something was noticed, None if it does not."""
    if event["event"] in _NOTICES or (event["event"] == "stop" and event["message"]):
        return event["time"]
    if "noticed" not in (phases := phases_of(event)):
        return None
    return event["time"] - sum(phases.values()) + phases["noticed"]
