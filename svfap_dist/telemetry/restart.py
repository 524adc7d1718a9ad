"""How long a rank took to its first step, by phase; a restart begins at the last log row before.

In: laps, as the parts of a start-up are done. Out: the `first_step` event of a run, from which
`restarts` lists the restarts. The phases, in order; the first three are measured by Ray Train's
driver side and missing elsewhere:

    noticed     from the attempt's last log row to Ray Train's notice of a failed rank, so up to
                `train.log_every` steps too long
    group       old ranks ended, new processes placed and connected, without their imports
    imports     packages imported by the process of rank 0; 0 where it was on standby
    connect     process group, and DeepSpeed's import where it was not made before
    context     newest checkpoint's state, decode backend, owner token, files of the run
    engine      network, optimizer, ZeRO partitions
    checkpoint  download, if it is not on this disk, and load
    prepare     validation data, and the evaluation of a run that begins
    data        wait for the first batch
    step        the first step, as the host sees it: on a GPU it may still be computing
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from svfap_dist.telemetry.goodput import BEGINNINGS

FIRST_STEP = "first_step"
PHASES = (
    "noticed",
    "group",
    "imports",
    "connect",
    "context",
    "engine",
    "checkpoint",
    "prepare",
    "data",
    "step",
)


class StartClock:
    """Seconds by phase of this process's start-up, up to the first step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()
        self._on_first_step: Callable[[], None] = lambda: None
        self._done = False

    def begin(
        self,
        before: Mapping[str, float] | None = None,
        on_first_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Start to measure an attempt.

        Args:
            before: Seconds of the phases before this call.
            on_first_step: Called once, after the attempt's first step.
        """
        self._seconds, self._on_first_step = dict(before or {}), on_first_step
        self._last, self._done = time.perf_counter(), False

    def lap(self, phase: str) -> None:
        """Count the time since the last lap.

        Args:
            phase: One of `PHASES`.
        """
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def is_running(self) -> bool:
        """Return whether the first step is not done yet."""
        return not self._done

    def finish(self) -> dict[str, float]:
        """Return the seconds by phase; the first step is done."""
        self._done = True
        self._on_first_step()
        return self._seconds


CLOCK = StartClock()  # of this process, which starts once


@dataclasses.dataclass(frozen=True)
class Restart:
    """One restart of a run. step: completed steps it continued from; time: of its first step."""

    attempt: int
    step: int
    time: float
    seconds: Mapping[str, float]  # by phase

    @property
    def total(self) -> float:
        """Return the seconds of all phases."""
        return sum(self.seconds.values())


def restarts(events: Iterable[Mapping[str, Any]]) -> list[Restart]:
    """Return the restarts that reached a step, in order.

    Args:
        events: Lines of events.jsonl.
    """
    found, attempt = [], 0
    for event in events:
        if event["event"] in BEGINNINGS:
            attempt = event["attempt"]
        elif event["event"] == FIRST_STEP and attempt > 1:
            found.append(Restart(attempt, event["step"] - 1, event["time"], event["seconds"]))
    return found
