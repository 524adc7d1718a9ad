"""Reasons to save a checkpoint early: signals, a time limit, preempted nodes.

Each rank notices its own; all ranks agree after a step on what follows (`health`). There are two
kinds:

- *Stop*: save and end. SIGTERM, SIGUSR1 (Slurm's warning before the time limit) and SIGINT
  (Ctrl-C), a launcher's request by other means than signals, and `train.max_seconds`. The first one
  becomes the run's stop reason, which `exit_code` translates for a shell or a scheduler.
- *Save*: a node will be preempted (Ray's notice, which rank 0 looks at). The run saves and
  continues; the launcher restarts the ranks elsewhere when the node is gone.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Set
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FINISHED, TIME_IS_UP = "finished", "train.max_seconds"
EX_TEMPFAIL = 75  # "try again later" (sysexits.h): exit code when the time limit is over

log = logging.getLogger(__name__)
_outermost: list[list[str]] = []  # names caught by the outermost `catch_stop_signals`

NodesLeaving = Callable[[], Set[str]]


def exit_code(stop_reason: str) -> int:
    """Return 0 for a finished run, 128 + number for a signal, 75 for the time limit.

    Args:
        stop_reason: `RunResult.stop_reason`.
    """
    if stop_reason == FINISHED:
        return 0
    if stop_reason == TIME_IS_UP:
        return EX_TEMPFAIL
    return 128 + signal.Signals.__members__.get(stop_reason, signal.SIGINT)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[Callable[[], str]]:
    """Catch STOP_SIGNALS and yield a function that returns the first one's name, or "".

    A second signal has its previous effect. Signals reach the main thread only; in others (Ray's
    workers) none is caught. A nested call shares what the outer one caught, so a signal between two
    folds of a fine-tuning stops the next.
    """
    if _outermost:
        outer = _outermost[0]
        yield lambda: outer[0] if outer else ""
        return
    caught: list[str] = []
    before: dict[int, Any] = {}

    def handle(number: int, _: object) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[number])
        log.info("Saving a checkpoint and stopping after this step; a second signal stops at once.")

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, handle) or signal.SIG_DFL
        _outermost.append(caught)
    try:
        yield lambda: caught[0] if caught else ""
    finally:
        _outermost[:] = [other for other in _outermost if other is not caught]
        for number, handler in before.items():
            signal.signal(number, handler)


class Notice:
    """Reasons of one rank to stop or to save.

    Args:
        caught: Returns the name of a signal, or "".
        requested: Returns the launcher's reason to stop, or "".
        nodes_leaving: Returns the run's nodes that will be preempted, as far as this rank knows;
            called at every step, so it must not wait. None where the launcher cannot know.
        max_seconds: Time limit from now on; 0: none.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        caught: Callable[[], str],
        requested: Callable[[], str],
        nodes_leaving: NodesLeaving | None,
        max_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._caught, self._requested, self._nodes_leaving = caught, requested, nodes_leaving
        self._clock = clock
        self._end = clock() + max_seconds if max_seconds else float("inf")
        self._known: Set[str] = frozenset()

    def external_stop_reason(self) -> str:
        """Return the signal or the launcher's request to stop, "" without one."""
        return self._caught() or self._requested()

    def stop_reason(self) -> str:
        """Return the reason to stop, the time limit included, "" without one."""
        return self.external_stop_reason() or (TIME_IS_UP if self._clock() >= self._end else "")

    def new_nodes_leaving(self) -> bool:
        """Return whether more nodes will leave than at the last call."""
        if self._nodes_leaving is None:
            return False
        found = self._nodes_leaving()
        is_news = not found <= self._known
        self._known = self._known | found
        return is_news
